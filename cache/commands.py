"""The commands that finish or mend a store, put together from what it says of itself: there to be copied."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from cache.canonical import Json
from cache.catalog import Catalog, StoredTeacher
from data.geometry import VIEWS

_CONVERT = ["python", "cli.py", "convert-cache"]


def writing_command(catalog: Catalog, teachers: Sequence[str] = ()) -> str:
    """Return the command that writes what a store lacks; with ` --repair`, what is damaged too.

    teachers: keys of those that are concerned, all where none is named.  Of a derived store it is the `convert-cache`
    command that made it; else `extract-teachers` as the manifests imply it, where DIR stands for the devkit's folder.
    """
    stored = [teacher for key, teacher in catalog.teachers.items() if not teachers or key in teachers]
    arrays = [array for teacher in stored for view in teacher.views.values() for array in view.layouts.values()]
    for layout in arrays:
        command = derivation_command(catalog, layout.path)
        if command is not None:
            return command
    if any(array.source for teacher in stored for v in teacher.views.values() for array in v.manifest.arrays.values()):
        return shlex.join([*_CONVERT, "SOURCE", str(catalog.path)])
    return _extraction_command(catalog, stored)


def derivation_command(catalog: Catalog, array: str | None = None) -> str | None:
    """Return the `convert-cache` command that made a store, or one array of it by path; None where none did.

    It names the place where the store lies now.
    """
    for layout in catalog.layouts():
        if array in (None, layout.path):
            for note in reversed(catalog.storage.array(layout).read_provenance()):
                words = _words(note.get("command"))
                if words[:3] == _CONVERT and len(words) >= 5:
                    return shlex.join([*words[:4], str(catalog.path), *words[5:]])
    return None


def _words(command: Json) -> list[str]:
    # Provenance is untrusted, and a command is there to be copied: what is odd is not shown, the rest is quoted anew.
    if not isinstance(command, str) or not command.isprintable():
        return []
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _extraction_command(catalog: Catalog, teachers: Sequence[StoredTeacher]) -> str:
    dataset = catalog.root.dataset
    words = ["--voc-root", "DIR", *_repeated("--voc-set", dataset.sets)]
    if dataset.limit is not None:
        words += ["--limit", str(dataset.limit)]
    words += _repeated("--teacher", [_named(teacher) for teacher in teachers])
    if teachers and all(teacher.manifest.untrained for teacher in teachers):
        words.append("--untrained")
    views = [view for view in VIEWS if all(view in teacher.views for teacher in teachers)]
    if len(views) < len(VIEWS):
        words += _repeated("--view", views)
    layouts = [layout for teacher in teachers for view in teacher.views.values() for layout in view.layouts.items()]
    dtypes = [layout.dtype for name, layout in layouts if name == "features"]
    words += _repeated("--dtype", [dtype for dtype in dtypes if dtype != "float16"][:1])
    cuts = [layout.shard_samples for _, layout in layouts]
    words += _repeated("--shard-samples", [str(cut) for cut in cuts if cut != 64][:1])
    return shlex.join(["python", "cli.py", "extract-teachers", *words, "--out", str(catalog.path)])


def _named(teacher: StoredTeacher) -> str:
    key, spec = teacher.manifest.key, teacher.manifest.identity.get("spec", teacher.manifest.key)
    return key if spec == key else f"{key}={spec}"


def _repeated(option: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (option, value)]
