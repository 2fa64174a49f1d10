"""`relabel-logits`: new logits from stored image embeddings and other prompts, in seconds. No image is looked at.

Of the teacher, only what embeds the prompts is run; its weights must be those that made the embeddings.
"""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.canonical import Json
from cache.catalog import Catalog, StoredTeacher, read_catalog
from cache.manifest import Dataset, check_teacher_key
from cache.relabel import Relabelling, RelabelRequest
from cache.relabel import relabel as relabel_store
from cache.relabel_source import find_source, refuse_other_identity, refuse_source, stored_text_embeddings
from data.errors import DatasetError, StoreStaleError, UsageError
from data.records import ImageRecord
from data.voc import read_voc
from features.prompt_file import PromptFile, read_prompts
from features.registry import Precision, build_teacher
from features.spec import parse_spec
from pipeline.progress import progress, say
from pipeline.teacher_check import MULTILABEL_MAP, logit_teacher_maps

DEFAULT_VOC_ROOT = Path("data/VOCdevkit")
MAP_BEFORE = "multilabel_map_before"
_PRECISIONS: dict[str, Precision] = {"bfloat16": "bfloat16", "float16": "float16"}


@dataclass(frozen=True)
class RelabelConfig:
    """What `relabel-logits` was asked for; every field is one of its arguments or options.

    teacher, key: None for the only teacher that can be relabelled, and for its key followed by the file's name.
    voc_root, voc_sets: the images whose annotations judge the logits; those of the store, if they are at hand.
    """

    store: Path
    prompts: Path
    teacher: str | None = None
    key: str | None = None
    weights: dict[str, Path] = field(default_factory=dict)
    untrained: bool = False
    logit_scale: float | None = None
    voc_root: Path | None = None
    voc_sets: tuple[str, ...] = ()
    repair: bool = False

    def command(self, teacher: str, key: str) -> str:
        """Return the command that asks for the same again, with the keys that were chosen; it resumes."""
        words = ["python", "cli.py", "relabel-logits", str(self.store), "--prompts", str(self.prompts)]
        words += ["--teacher", teacher, "--as", key]
        words += [word for name, path in self.weights.items() for word in ("--weights", f"{name}={path}")]
        words += ["--untrained"] if self.untrained else []
        words += [] if self.logit_scale is None else ["--logit-scale", repr(self.logit_scale)]
        words += [] if self.voc_root is None else ["--voc-root", str(self.voc_root)]
        return shlex.join([*words, *(word for name in self.voc_sets for word in ("--voc-set", name))])


@dataclass(frozen=True)
class Relabelled:
    """What came of it. source, key: of the teacher that was relabelled and of the new one.

    dataset: the store's images.  maps: image-level multi-label mAP (a fraction) by key, of what could be judged.
    judged_sets: the image sets of these figures, empty where nothing was judged.
    """

    config: RelabelConfig
    dataset: Dataset
    source: str
    key: str
    untrained: bool
    seconds: float
    maps: dict[str, float | None]
    judged_sets: tuple[str, ...]
    done: Relabelling


def relabel(config: RelabelConfig) -> Relabelled:
    """Add the teacher of new logits to the store, or go on with it where an earlier run began.

    Raises UsageError for prompts, keys or options that cannot be; StoreIncompleteError where embeddings are missing;
    StoreStaleError where the teacher that embeds the prompts is not the stored one, or other logits have the key;
    TeacherError, DatasetError for a devkit that was named, or one of the store's errors.
    """
    start = time.monotonic()
    file = read_prompts(config.prompts)
    _check_scale(config.logit_scale)
    catalog = read_catalog(config.store)
    source = find_source(catalog, config.teacher)
    _refuse_stray_weights(config, source)
    key = _key(config, source)
    refuse_source(catalog, source, key)
    judge = _Judge(config, catalog, (source.manifest.key, key))
    request = _request(config, catalog, source, key, file)
    done = relabel_store(catalog, request, judge=judge, show=progress)
    if not done.written:
        say(f"{key} is complete: nothing to do")
    return Relabelled(
        config=config,
        dataset=catalog.root.dataset,
        source=source.manifest.key,
        key=key,
        untrained=source.manifest.untrained,
        seconds=time.monotonic() - start,
        maps=judge.maps,
        judged_sets=judge.sets if judge.maps else (),
        done=done,
    )


def _check_scale(scale: float | None) -> None:
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"--logit-scale: expected a factor above 0, found {scale}")


def _key(config: RelabelConfig, source: StoredTeacher) -> str:
    if config.key is None:
        stem = re.sub(r"[^a-z0-9_.-]+", "-", config.prompts.stem.lower()).strip("-")
        if not stem:
            raise UsageError(f"{config.prompts}: its name gives no key for the new logits", hint="name them: --as KEY")
        return f"{source.manifest.key}_{stem}"[:64]
    try:
        check_teacher_key(config.key)
    except ValueError as error:
        raise UsageError(f"--as {config.key}: {error}") from None
    return config.key


def _names(source: StoredTeacher) -> list[str]:
    """Return what a teacher may be called in `--weights`: key, spec, spec without options."""
    spec = str(source.manifest.identity.get("spec", source.manifest.key))
    return [source.manifest.key, spec, parse_spec(spec).name]


def _refuse_stray_weights(config: RelabelConfig, source: StoredTeacher) -> None:
    stray = sorted(set(config.weights) - set(_names(source)))
    if stray:
        raise UsageError(
            f"--weights {stray[0]}=…: the teacher to relabel is {' or '.join(dict.fromkeys(_names(source)))}"
        )


def _request(
    config: RelabelConfig, catalog: Catalog, source: StoredTeacher, key: str, file: PromptFile
) -> RelabelRequest:
    stored = source.manifest.identity
    scale, bias = stored.get("logit_scale"), stored.get("logit_bias")
    if not isinstance(scale, int | float) or not isinstance(bias, int | float | None) or "prompts" not in stored:
        raise StoreStaleError(f"{catalog.path}: {source.manifest.key} does not say how its logits were made")
    scale = float(scale) if config.logit_scale is None else config.logit_scale
    identity: dict[str, Any] = {**stored, "prompts": file.prompts.identity(), "logit_scale": scale}
    text, origin = stored_text_embeddings(catalog, key, identity, repair=config.repair), dict[str, Json]()
    if text is None:
        text, origin = _embed(config, catalog, source, file)
    return RelabelRequest(
        source=source.manifest.key,
        key=key,
        identity=identity,
        text_embeddings=text,
        logit_scale=scale,
        logit_bias=bias,
        facts={
            **origin,
            "command": config.command(source.manifest.key, key),
            "prompts": {"file": str(file.path), "sha256": file.sha256},
        },
        repair=config.repair,
    )


def _embed(
    config: RelabelConfig, catalog: Catalog, source: StoredTeacher, file: PromptFile
) -> tuple[NDArray[np.float32], dict[str, Json]]:
    """Return the text embeddings [20, D] of the prompts by the stored teacher, which is built for that.

    With it what its provenance says: versions, and where its weights came from.
    """
    manifest = source.manifest
    spec = str(manifest.identity.get("spec", manifest.key))
    path = next((config.weights[name] for name in _names(source) if name in config.weights), None)
    untrained = path is None and (manifest.untrained or config.untrained)
    say(f"building teacher {manifest.key}{' (untrained)' if untrained else ''} to embed the prompts")
    teacher = build_teacher(
        spec,
        weights=path,
        untrained=untrained,
        precision=_PRECISIONS.get(str(manifest.identity.get("autocast")), "float32"),
        prompts=file.prompts,
    )
    refuse_other_identity(catalog, source, teacher.identity(), but=("prompts",))
    assert teacher.text_embeddings is not None  # its identity, which holds prompts, is that of a teacher with them
    return teacher.text_embeddings, teacher.provenance()


class _Judge:
    """Judges source and new logits by the annotations, where they are at hand. maps: mAP by key, once it was called."""

    def __init__(self, config: RelabelConfig, catalog: Catalog, keys: Sequence[str]) -> None:
        self.maps: dict[str, float | None] = {}
        self.sets = config.voc_sets or catalog.root.dataset.sets
        self._store = catalog.path
        self._keys = keys
        self._records = self._read(config, catalog.root.dataset.limit)

    def _read(self, config: RelabelConfig, limit: int | None) -> list[ImageRecord]:
        try:
            return read_voc(config.voc_root or DEFAULT_VOC_ROOT, self.sets, None if config.voc_sets else limit)
        except DatasetError as error:
            if config.voc_root is not None or config.voc_sets:
                raise
            say(f"mAP not measured, for want of annotations: {error.message}; name their folder with --voc-root")
            return []

    def __call__(self) -> dict[str, Json]:
        """Return what the provenance is to say."""
        if not self._records:
            return {}
        found = logit_teacher_maps(self._store, self._records)
        self.maps = {key: found[key] for key in self._keys if key in found}
        if not self.maps:
            say(f"mAP not measured: not all images of {' + '.join(self.sets)} are in {self._store}")
            return {}
        before, after = (self.maps.get(key) for key in self._keys)
        return {MULTILABEL_MAP: after, MAP_BEFORE: before, "multilabel_map_sets": list(self.sets)}


def relabel_lines(relabelled: Relabelled) -> list[str]:
    """Return what is to be said in the end: both mAP, repairs, the time, the next command."""
    lines = [
        f"{key}: image-level multi-label mAP {_percent(value)} on {' + '.join(relabelled.judged_sets)}"
        + (" (UNTRAINED: expect chance)" if relabelled.untrained else "")
        for key, value in relabelled.maps.items()
    ]
    for repair in relabelled.done.repairs:
        how = "the same bytes" if repair.same_bytes else "OTHER BYTES than before; noted in its provenance"
        lines.append(f"repaired {repair.array}, shard {repair.shard}: {how}")
    lines.append(
        f"{relabelled.key}: {relabelled.done.written} logits made from the embeddings of {relabelled.source} in"
        f" {relabelled.seconds:.1f} s"
    )
    config, dataset = relabelled.config, relabelled.dataset
    words = ["--voc-root", str(config.voc_root)] if config.voc_root is not None else []
    words += [word for name in dataset.sets for word in ("--voc-set", name)]
    words += ["--limit", str(dataset.limit)] if dataset.limit else []
    words += ["--cached-teachers", str(config.store), "--logit-teacher", relabelled.key]
    return [*lines, f"next: python cli.py train {shlex.join(words)}"]


def _percent(value: float | None) -> str:
    return "none (no objects)" if value is None else f"{100 * value:.1f}"
