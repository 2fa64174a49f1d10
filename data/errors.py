"""The project's one error tree; each class carries the exit code `cli.py` ends with.

```
TeachOnceError            1  operational failure
├── UsageError            2  flags or a configuration that cannot mean anything
├── DatasetError          1  a devkit that cannot be read
│   ├── AnnotationError   1  one XML file: malformed, hostile, impossible boxes, unknown class
│   └── ImageError        1  one image file: missing, truncated, of another size than its annotation
├── DetectionsError       1  a detections folder or file that cannot be scored
├── WeightsError          1  trained weights that can neither be found here nor fetched
├── TeacherError          1  a teacher that cannot be built: weights that do not fit it
├── ReportError           1  runs that cannot be reported, or not together
├── ExportError           1  a student that cannot be exported, or whose export finds something else
├── TrainingError         1  training that cannot go on: non-finite loss or gradient, a checkpoint that cannot be saved
├── StoreWriteError       1  the store cannot be written: disk full, no permission, read-only
│   └── StoreLockedError  1  another process is writing this store
├── StoreError            3  the store cannot serve what was asked
│   ├── StoreMissingError     3  no store at that path
│   ├── StoreIncompleteError  3  samples, views or teachers that are not (yet) committed
│   ├── StoreStaleError       3  the store was made from something else than what was asked for
│   └── StoreCorruptError     3  bytes on disk contradict the manifest, the ledger or a checksum
└── CheckpointError       3  a checkpoint that is missing, unreadable or for something else
```
"""

from __future__ import annotations


class TeachOnceError(Exception):
    """A foreseeable failure, told in plain words.

    `message` says what is wrong, expected against found; `hint` names the next command to run or the thing to change.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  next: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # The hint is keyword-only: the default reduction would lose it on the way out of a DataLoader worker.
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(kind: type[TeachOnceError], message: str, hint: str | None) -> TeachOnceError:
    return kind(message, hint=hint)


class ExportError(TeachOnceError):
    """A student cannot be exported, or the exported one finds something else."""


class ReportError(TeachOnceError):
    """A run's folder cannot be reported, or not together with the others, or the report cannot be written."""


class UsageError(TeachOnceError):
    """Flags, names or a configuration that cannot mean anything."""

    exit_code = 2


class DatasetError(TeachOnceError):
    """A devkit, an image set or a part of one cannot be read."""


class AnnotationError(DatasetError):
    """One annotation file is malformed, hostile or says something impossible."""


class ImageError(DatasetError):
    """One image file is missing, truncated or of another size than its annotation says."""


class DetectionsError(TeachOnceError):
    """A detections folder or file cannot be scored."""


class WeightsError(TeachOnceError):
    """Trained weights are not in the local hub cache and cannot be fetched."""


class TeacherError(TeachOnceError):
    """A teacher cannot be built: its weights cannot be read or do not fit, or its output is no use."""


class TrainingError(TeachOnceError):
    """Training cannot go on: a loss or gradient that is not finite, or a checkpoint that cannot be saved."""


class StoreWriteError(TeachOnceError):
    """The store cannot be written; what was committed before is intact."""


class StoreLockedError(StoreWriteError):
    """Another process is writing this store."""


class StoreError(TeachOnceError):
    """The store cannot serve what was asked of it."""

    exit_code = 3


class StoreMissingError(StoreError):
    """There is no store at that path."""


class StoreIncompleteError(StoreError):
    """Samples, views or teachers that were asked for are not committed."""


class StoreStaleError(StoreError):
    """The store was made from something else than what was asked for."""


class StoreCorruptError(StoreError):
    """Bytes on disk contradict the manifest, the ledger or a checksum."""


class CheckpointError(TeachOnceError):
    """A checkpoint is missing, unreadable or for another student."""

    exit_code = 3
