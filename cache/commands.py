"""The commands that finish or mend a store, put together from what it says of itself: there to be copied."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from cache.canonical import Json
from cache.catalog import Catalog, StoredTeacher
from cache.image_arrays import is_image_store, training_command
from data.geometry import VIEWS, View

_EXTRACT = ("python", "cli.py", "extract-teachers")
_CONVERT = ("python", "cli.py", "convert-cache")
_RELABEL = ("python", "cli.py", "relabel-logits")
# Of those that make what they write from what is stored: where among the words the store stands that they write to.
_PLACE_OF_STORE: dict[tuple[str, ...], int] = {_CONVERT: 4, _RELABEL: 3}


def writing_command(catalog: Catalog, teachers: Sequence[str] = ()) -> str:
    """Return the command that writes what a store lacks; with ` --repair`, what is damaged too.

    teachers: keys of those that are concerned, all where none is named.  Of a derived store it is the `convert-cache`
    command that made it, of relabelled teachers alone the `relabel-logits` command of the first; else
    `extract-teachers` as the manifests imply it, where DIR stands for the devkit's folder; of an image store `train`.
    """
    if is_image_store(catalog):
        return training_command(catalog)
    stored = [teacher for key, teacher in catalog.teachers.items() if not teachers or key in teachers]
    # What is relabelled is made from what the others have: their command comes first.
    stored = [teacher for teacher in stored if relabelled_from(catalog, teacher) is None] or stored
    arrays = [array for teacher in stored for view in teacher.views.values() for array in view.layouts.values()]
    for layout in arrays:
        command = derivation_command(catalog, layout.path)
        if command is not None:
            return command
    if any(array.source for teacher in stored for v in teacher.views.values() for array in v.manifest.arrays.values()):
        return _command_unknown(catalog, stored[0])
    return _extraction_command(catalog, stored)


def adding_views(catalog: Catalog, key: str, views: Sequence[View]) -> str:
    """Return how views get into what a store holds of a teacher: the command, or what to do before one."""
    teacher = catalog.teachers[key]
    options = " ".join(_repeated("--view", views))
    paths = [layout.path for view in teacher.views.values() for layout in view.layouts.values()]
    source = relabelled_from(catalog, teacher)
    if source is not None:
        again = writing_command(catalog, [key])
        return f"add it to {source} (extract-teachers … --teacher {source} {options}) and repeat: {again}"
    if any(derivation_command(catalog, path) for path in paths):
        return f"convert it from a store that has it ({options})"
    return f"add it: {_extraction_command(catalog, [teacher], add=views)}"


def derivation_command(catalog: Catalog, array: str | None = None) -> str | None:
    """Return the `convert-cache` or `relabel-logits` command that made a store, or one array of it by path.

    It names the place where the store lies now. None where there is none.
    """
    for layout in catalog.layouts():
        if array in (None, layout.path):
            for note in reversed(catalog.storage.array(layout).read_provenance()):
                words = _words(note.get("command"))
                place = _PLACE_OF_STORE.get(tuple(words[:3]), len(words))
                if place < len(words):
                    return shlex.join([*words[:place], str(catalog.path), *words[place + 1 :]])
    return None


def relabelled_from(catalog: Catalog, teacher: StoredTeacher) -> str | None:
    """Return the key of the teacher from whose embeddings, in this same store, a teacher's logits were made.

    None for any other teacher, also for relabelled logits that were copied without what they were made from.
    """
    sources = {array.source for view in teacher.views.values() for array in view.manifest.arrays.values()}
    paths = (path for path, fingerprint in catalog.fingerprints.items() if fingerprint in sources)
    return next((path.partition("/")[0] for path in paths), None)


def _command_unknown(catalog: Catalog, teacher: StoredTeacher) -> str:
    """Return the command of a teacher that was made from what is stored, where no run has left its own."""
    source, store = relabelled_from(catalog, teacher), str(catalog.path)
    if source is None:
        return shlex.join([*_CONVERT, "SOURCE", store])
    key = teacher.manifest.key
    return shlex.join([*_RELABEL, store, "--prompts", "FILE", "--teacher", source, "--as", key])


def _words(command: Json) -> list[str]:
    # Provenance is untrusted, and a command is there to be copied: what is odd is not shown, the rest is quoted anew.
    if not isinstance(command, str) or not command.isprintable():
        return []
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _extraction_command(catalog: Catalog, teachers: Sequence[StoredTeacher], add: Sequence[View] = ()) -> str:
    dataset = catalog.root.dataset
    words = ["--voc-root", "DIR", *_repeated("--voc-set", dataset.sets)]
    if dataset.limit is not None:
        words += ["--limit", str(dataset.limit)]
    words += _repeated("--teacher", [_named(teacher) for teacher in teachers])
    if teachers and all(teacher.manifest.untrained for teacher in teachers):
        words.append("--untrained")
    words += _repeated("--precision", [p for t in teachers if (p := t.manifest.identity.get("autocast"))][:1])
    words += _repeated("--prompts", _prompt_files(catalog, teachers)[:1])
    views = [view for view in VIEWS if all(view in teacher.views for teacher in teachers)]
    if add or len(views) < len(VIEWS):
        words += _repeated("--view", add or views)
    layouts = [layout for teacher in teachers for view in teacher.views.values() for layout in view.layouts.items()]
    dtypes = [layout.dtype for name, layout in layouts if name == "features"]
    words += _repeated("--dtype", [dtype for dtype in dtypes if dtype != "float16"][:1])
    cuts = [layout.shard_samples for _, layout in layouts]
    words += _repeated("--shard-samples", [str(cut) for cut in cuts if cut != 64][:1])
    return shlex.join([*_EXTRACT, *words, "--out", str(catalog.path)])


def _prompt_files(catalog: Catalog, teachers: Sequence[StoredTeacher]) -> list[str]:
    """Return the prompt files that runs have noted beside the teachers' arrays."""
    layouts = [layout for teacher in teachers for view in teacher.views.values() for layout in view.layouts.values()]
    notes = (note.get("prompts") for layout in layouts for note in catalog.storage.array(layout).read_provenance())
    files = [note.get("file") for note in notes if isinstance(note, dict)]
    return [file for file in files if isinstance(file, str) and file.isprintable()]


def _named(teacher: StoredTeacher) -> str:
    key, spec = teacher.manifest.key, teacher.manifest.identity.get("spec", teacher.manifest.key)
    return key if spec == key else f"{key}={spec}"


def _repeated(option: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (option, value)]
