"""What the stored teachers say of the images that a student is compared with them on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache.reader import TeacherStore
from cache.selected_array import SelectedArray
from cache.selection import Selection
from data.errors import StoreIncompleteError, UsageError
from data.geometry import View
from data.records import ImageRecord
from pipeline.checkpoint import Checkpoint
from pipeline.stored_targets import decode_features


@dataclass(frozen=True)
class AgreementRequest:
    """Which stored teachers a student is compared with.

    stores: joined by image id.  feature_teacher, logit_teacher: keys; by default those that the student was distilled
    from, else the only one that has what is compared.
    """

    stores: tuple[Path, ...]
    feature_teacher: str | None = None
    logit_teacher: str | None = None


class AgreementTargets:
    """Stored features and logits of the compared images, view `original`.

    selection: which store serves which image.  feature_teacher, logit_teacher: keys; None where no teacher has it.
    """

    def __init__(
        self, request: AgreementRequest, checkpoint: Checkpoint, records: Sequence[ImageRecord], sets: Sequence[str]
    ) -> None:
        """Open the stores. sets: image sets of the records, for messages.

        Raises UsageError where the choice of teachers is open or none has anything; StoreMissingError,
        StoreIncompleteError with the command that extracts what lacks, StoreStaleError or StoreCorruptError.
        """
        self._records, self._sets, self._stores = records, tuple(sets), request.stores
        stores = [TeacherStore(path) for path in request.stores]
        self.selection = Selection(stores, [record.id for record in records], called="images")
        distilled = checkpoint.targets.get("teachers", {})
        self.feature_teacher = self._choose("features", request.feature_teacher, distilled.get("features"))
        self.logit_teacher = self._choose("logits", request.logit_teacher, distilled.get("logits"))
        if self.feature_teacher is None and self.logit_teacher is None:
            raise UsageError(
                f"--agreement: no teacher in {self.selection.where} has features or logits",
                hint="give a store that extract-teachers made",
            )
        self._features = self._arrays(self.feature_teacher, "features")
        self._logits = self._arrays(self.logit_teacher, "logits")

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(Gh, Gw, C) of the feature teacher, which must be there."""
        gh, gw, channels = self._features["features"].sample_shape
        return gh, gw, channels

    @property
    def untrained(self) -> list[str]:
        """Keys of the compared teachers that were never trained."""
        keys = dict.fromkeys(key for key in (self.feature_teacher, self.logit_teacher) if key is not None)
        return [key for key in keys if self.selection.manifest(key).untrained]

    def features(self, positions: Sequence[int]) -> torch.Tensor:
        """Return the features [B, Gh, Gw, C] of the records at these positions, as they are stored, int8 restored."""
        return decode_features({name: torch.from_numpy(rows) for name, rows in _gather(self._features, positions)})

    def logits(self) -> NDArray[np.float32]:
        """Return the logits of all records, [N, 20]: 80 bytes an image."""
        ((_, rows),) = _gather(self._logits, range(len(self._records)))
        return rows

    def record(self) -> list[dict[str, Any]]:
        """Return what identifies the stores and the arrays that are read."""
        return list(self.selection.record([*self._features.values(), *self._logits.values()]))

    def _choose(self, array: str, named: str | None, distilled: str | None) -> str | None:
        candidates = [key for key, names in self.selection.outputs.items() if array in names]
        option = f"--{array.removesuffix('s')}-teacher"
        if named is not None and named not in candidates:
            raise UsageError(
                f"{option} {named}: {self.selection.where} has no {array} of it (teachers with {array}:"
                f" {', '.join(candidates) or 'none'})"
            )
        if named is not None or distilled in candidates:
            return named or distilled
        if len(candidates) > 1:
            raise UsageError(
                f"several teachers in {self.selection.where} have {array}: {', '.join(candidates)}",
                hint=f"choose the one to compare with: {option} NAME",
            )
        return candidates[0] if candidates else None

    def _arrays(self, teacher: str | None, name: str) -> dict[str, SelectedArray]:
        if teacher is None:
            return {}
        try:
            return self.selection.arrays(teacher, name, ("original",))
        except StoreIncompleteError as error:
            if error.hint is not None and "resumes" in error.hint:
                raise
            other = self._stores[0].with_name(f"{self._stores[0].stem}-{'-'.join(self._sets).replace(':', '-')}.zarr")
            raise StoreIncompleteError(
                error.message,
                hint=f"extract them too: {self._extraction(teacher, other)}\n        then add --agreement {other}",
            ) from error

    def _extraction(self, teacher: str, out: Path) -> str:
        manifest = self.selection.manifest(teacher)
        spec = manifest.identity.get("spec", teacher)
        root = self._records[0].annotation_path.parents[2]
        words = ["python", "cli.py", "extract-teachers", "--voc-root", str(root)]
        words += [word for name in self._sets for word in ("--voc-set", name)]
        words += ["--teacher", teacher if spec == teacher else f"{teacher}={spec}", "--view", "original"]
        words += ["--untrained"] if manifest.untrained else []
        return shlex.join([*words, "--out", str(out)])


def _gather(arrays: dict[str, SelectedArray], positions: Sequence[int]) -> list[tuple[str, NDArray[Any]]]:
    views: list[View] = ["original"] * len(positions)
    return [(name, array.gather(positions, views)) for name, array in arrays.items()]
