"""Downloads a VOC devkit with torchvision's downloader, which checks the archive's digest."""

from __future__ import annotations

import tarfile
from http.client import HTTPException
from pathlib import Path

from .errors import DatasetError, UsageError

# The two years detection is trained on; each archive holds all its image sets.
_ARCHIVES = {
    (2007, "trainval"): "VOCtrainval_06-Nov-2007.tar",
    (2007, "test"): "VOCtest_06-Nov-2007.tar",
    (2012, "trainval"): "VOCtrainval_11-May-2012.tar",
}


def download_voc(voc_root: Path, year: int = 2007, image_set: str = "trainval") -> Path:
    """Return `voc_root/VOC<year>` after downloading and unpacking the archive that holds the image set.

    voc_root: where the devkit shall lie; its last component must be `VOCdevkit`, as the archives have it. The archive
    stays beside it, and a complete one that lies there already is not downloaded again.

    Raises UsageError for another folder name, year or image set, DatasetError where the download fails.
    """
    if voc_root.name != "VOCdevkit":
        raise UsageError(
            f"expected a folder called VOCdevkit, as the archives unpack to, found {voc_root}",
            hint=f"choose --voc-root {voc_root / 'VOCdevkit'}",
        )
    archive = _ARCHIVES.get((year, "trainval" if image_set in ("train", "val") else image_set))
    if archive is None:
        raise UsageError(
            f"expected 2007:train, val, trainval or test, or 2012:train, val or trainval, found {year}:{image_set}"
        )
    # Only here: importing torchvision takes seconds, and reading a devkit does not need it.
    from torchvision.datasets import VOCDetection

    root = voc_root.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        VOCDetection(str(root), year=str(year), image_set=image_set, download=True)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        raise DatasetError(
            f"VOC{year} {image_set} could not be downloaded or unpacked ({error})",
            hint=f"try again, or fetch {archive} from the PASCAL VOC site by other means\n"
            f"        and unpack it in {root}, so that {voc_root / f'VOC{year}'} exists",
        ) from error
    return voc_root / f"VOC{year}"
