from pathlib import Path
from urllib.error import URLError

import pytest

from data.download import download_voc
from data.errors import DatasetError, UsageError


class FakeVOCDetection:
    """Stands for torchvision's class: notes how it was called, and fails if told to."""

    calls: list[dict[str, object]]
    failure: Exception | None

    def __init__(self, root: str, **options: object) -> None:
        self.calls.append({"root": root, **options})
        if self.failure is not None:
            raise self.failure
        (Path(root) / "VOCdevkit" / f"VOC{options['year']}").mkdir(parents=True)


@pytest.fixture
def downloader(monkeypatch: pytest.MonkeyPatch) -> type[FakeVOCDetection]:
    fake = type("Fake", (FakeVOCDetection,), {"calls": [], "failure": None})
    monkeypatch.setattr("torchvision.datasets.VOCDetection", fake)
    return fake


@pytest.mark.parametrize(("year", "image_set"), [(2007, "trainval"), (2007, "test"), (2007, "train"), (2012, "val")])
def test_the_devkit_lies_where_the_root_says(
    tmp_path: Path, downloader: type[FakeVOCDetection], year: int, image_set: str
) -> None:
    root = tmp_path / "new" / "VOCdevkit"
    assert download_voc(root, year, image_set) == root / f"VOC{year}"
    assert (root / f"VOC{year}").is_dir()
    assert downloader.calls == [
        {"root": str(tmp_path / "new"), "year": str(year), "image_set": image_set, "download": True}
    ]


FAILURES = {
    "no network": URLError("Name or service not known"),
    "cut short": RuntimeError("File not found or corrupted."),
    "disk full": OSError(28, "No space left on device"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize(
    ("year", "image_set", "archive"),
    [
        (2007, "val", "VOCtrainval_06-Nov-2007.tar"),
        (2007, "test", "VOCtest_06-Nov-2007.tar"),
        (2012, "trainval", "VOCtrainval_11-May-2012.tar"),
    ],
)
def test_a_failure_names_the_archive_to_fetch_by_hand(
    tmp_path: Path,
    downloader: type[FakeVOCDetection],
    failure: Exception,
    year: int,
    image_set: str,
    archive: str,
) -> None:
    downloader.failure = failure
    with pytest.raises(DatasetError) as caught:
        download_voc(tmp_path / "VOCdevkit", year, image_set)
    assert caught.value.message == f"VOC{year} {image_set} could not be downloaded or unpacked ({failure})"
    assert f"fetch {archive}" in str(caught.value)
    assert f"unpack it in {tmp_path}" in str(caught.value)


def test_another_folder_name_is_refused_with_the_right_one(tmp_path: Path, downloader: type[FakeVOCDetection]) -> None:
    with pytest.raises(UsageError) as caught:
        download_voc(tmp_path / "voc")
    assert caught.value.hint == f"choose --voc-root {tmp_path / 'voc' / 'VOCdevkit'}"
    assert downloader.calls == []


@pytest.mark.parametrize(("year", "image_set"), [(2012, "test"), (1999, "train"), (2007, "minitrain")])
def test_a_set_that_no_archive_holds_is_refused(
    tmp_path: Path, downloader: type[FakeVOCDetection], year: int, image_set: str
) -> None:
    with pytest.raises(UsageError, match=f"found {year}:{image_set}"):
        download_voc(tmp_path / "VOCdevkit", year, image_set)
    assert downloader.calls == []
