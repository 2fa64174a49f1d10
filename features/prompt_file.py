"""Prompts as data: the YAML file in which templates, class names and articles are written by hand.

```yaml
templates: ["a photo of {}.", "a drawing of {}."]   # each with one {}
class_names: {tvmonitor: television, sofa: [sofa, couch]}   # by VOC class; of several names the mean is taken
articles: true   # whether a or an goes before the name
```

What is left out is as in `features.prompts.DEFAULT_PROMPTS`. The file is untrusted input.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from data.errors import UsageError
from data.records import VOC_CLASSES

from .prompts import DEFAULT_PROMPTS, PromptSet

_KEYS = ("templates", "class_names", "articles")
_MAX_BYTES = 1_000_000
_QUOTES_HINT = 'put every template into quotes: templates: ["a photo of {}."]'


@dataclass(frozen=True)
class PromptFile:
    """A prompt file as it was read. sha256: of its bytes."""

    path: Path
    sha256: str
    prompts: PromptSet


def read_prompts(path: Path) -> PromptFile:
    """Return the prompts of a file.

    Raises UsageError, naming file and key, for a file that is missing or no YAML, for an unknown key or class, for
    templates, names or articles that cannot be.
    """
    content = _read(path)
    return PromptFile(path, hashlib.sha256(content).hexdigest(), _prompts(path, _parse(path, content)))


def _read(path: Path) -> bytes:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UsageError(f"{path}: expected a prompt file, found {what}", hint="give a YAML file: --prompts FILE")
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: the prompt file cannot be read ({error.strerror})") from None
    if len(content) > _MAX_BYTES:
        raise UsageError(f"{path}: expected a prompt file of at most {_MAX_BYTES:,} bytes, found a longer one")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML itself would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping's content; raises ConstructorError for a key that stands twice."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        # A subclass of the safe loader: plain values only, whatever tags the file holds.
        found = yaml.load(content, _Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        what = error.problem or error.context
        hint = None if isinstance(error, yaml.constructor.ConstructorError) else _QUOTES_HINT
        raise UsageError(f"{path}{line}: cannot be read as YAML: {what}", hint=hint) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        what = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"{path}: cannot be read as YAML: {what}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected the keys {', '.join(_KEYS)}, found {_kind(found)}", hint=_QUOTES_HINT)
    for key in found:
        if key not in _KEYS:
            raise UsageError(f"{path}: unknown key {key!r}; expected {', '.join(_KEYS)}", hint=_nearest(key, _KEYS))
    return found


def _prompts(path: Path, found: dict[str, Any]) -> PromptSet:
    articles = found.get("articles", DEFAULT_PROMPTS.articles)
    if not isinstance(articles, bool):
        _refuse(path, "articles", "true or false", articles)
    return PromptSet(
        templates=_templates(path, found["templates"]) if "templates" in found else DEFAULT_PROMPTS.templates,
        class_names=_class_names(path, found.get("class_names", {})),
        articles=articles,
    )


def _templates(path: Path, found: Any) -> tuple[str, ...]:
    templates = _texts(path, "templates", found)
    for template in templates:
        if not template.count("{") == template.count("}") == template.count("{}") == 1:
            _refuse(path, "templates", "exactly one {} in each, and no other brace", template)
    return templates


def _class_names(path: Path, found: Any) -> tuple[str | tuple[str, ...], ...]:
    if not isinstance(found, dict):
        _refuse(path, "class_names", "names by VOC class", found)
    for key in found:
        if key not in VOC_CLASSES:
            raise UsageError(
                f"{path}: class_names: expected one of the VOC classes ({', '.join(VOC_CLASSES)}), found {key!r}",
                hint=_nearest(key, VOC_CLASSES),
            )
    names = dict(zip(VOC_CLASSES, DEFAULT_PROMPTS.class_names, strict=True))
    for voc_class, value in found.items():
        given = _texts(path, f"class_names.{voc_class}", [value] if isinstance(value, str) else value)
        names[voc_class] = given if len(given) > 1 else given[0]
    _refuse_shared_names(path, names)
    return tuple(names.values())


def _refuse_shared_names(path: Path, names: dict[str, str | tuple[str, ...]]) -> None:
    owners: dict[str, str] = {}
    for voc_class, value in names.items():
        for name in (value,) if isinstance(value, str) else value:
            other = owners.setdefault(name, voc_class)
            if other != voc_class:
                raise UsageError(
                    f"{path}: class_names: expected names that tell classes apart, found {name!r} for {other} and"
                    f" {voc_class}"
                )


def _texts(path: Path, key: str, found: Any) -> tuple[str, ...]:
    """Return a list's texts: at least one, none of them twice."""
    if not isinstance(found, list):
        _refuse(path, key, "a list of texts" if key == "templates" else "a text or a list of texts", found)
    if not found:
        _refuse(path, key, "at least one text", found)
    for text in found:
        if not isinstance(text, str):
            _refuse(path, key, "text", text)
        if not text or not text.isprintable() or text != text.strip():
            _refuse(path, key, "printable text without spaces at its ends", text)
    for text, count in Counter(found).items():
        if count > 1:
            raise UsageError(f"{path}: {key}: expected every text once, found {text!r} {count} times")
    return tuple(found)


def _refuse(path: Path, key: str, expected: str, found: Any) -> NoReturn:
    hint = _QUOTES_HINT if key == "templates" else None
    raise UsageError(f"{path}: {key}: expected {expected}, found {_kind(found)}", hint=hint)


def _kind(found: Any) -> str:
    # Not the value of a list or a mapping: a few aliases make that one of any length.
    if found is None:
        return "nothing"
    if isinstance(found, bool):
        return "true" if found else "false"
    if isinstance(found, str):
        return repr(found)
    if isinstance(found, list):
        return "a list" if found else "an empty list"
    return "a mapping" if isinstance(found, dict) else f"a value of type {type(found).__name__}"


def _nearest(key: Hashable, known: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
    return f"did you mean {close[0]}?" if close else None
