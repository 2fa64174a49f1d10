"""Prompt files: what they mean, and how each mistake in one is told."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from data.errors import UsageError
from data.records import VOC_CLASSES
from features.prompt_file import read_prompts
from features.prompts import DEFAULT_PROMPTS, PromptSet

SHIPPED = Path(__file__).resolve().parents[2] / "features" / "prompt_sets"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "my prompts.yaml"


def prompts_of(file: Path, text: str) -> PromptSet:
    file.write_text(text, encoding="utf-8")
    return read_prompts(file).prompts


@pytest.mark.parametrize("text", ["", "# templates: nothing yet\n", "{}", "class_names: {}\narticles: true\n"])
def test_what_is_left_out_is_as_usual(file: Path, text: str) -> None:
    assert prompts_of(file, text) == DEFAULT_PROMPTS


def test_every_key_is_taken_over(file: Path) -> None:
    found = prompts_of(
        file,
        """
        templates:
          - a photo of {}.
          - "{}, drawn"
        class_names:
          tvmonitor: television
          sofa: [sofa, couch]
          bird: [bird]
        articles: false
        """,
    )
    assert found.templates == ("a photo of {}.", "{}, drawn")
    named = dict(zip(VOC_CLASSES, found.class_names, strict=True))
    assert (named["tvmonitor"], named["sofa"], named["bird"]) == ("television", ("sofa", "couch"), "bird")
    assert named["diningtable"] == "dining table"  # as usual
    assert found.sentences_of(("sofa", "couch")) == [
        "a photo of sofa.", "sofa, drawn", "a photo of couch.", "couch, drawn",
    ]  # fmt: skip


def test_letters_of_any_language_are_text(file: Path) -> None:
    assert prompts_of(file, 'templates: ["ein Foto: {} – schön"]').sentences_of("été") == ["ein Foto: a été – schön"]


def test_the_digest_is_that_of_the_file(file: Path) -> None:
    file.write_bytes(b"articles: true\n")
    assert read_prompts(file).sha256 == hashlib.sha256(b"articles: true\n").hexdigest()


@pytest.mark.parametrize("name", ["plain", "synonyms"])
def test_shipped_files_are_read_and_differ_from_the_default(name: str) -> None:
    assert read_prompts(SHIPPED / f"{name}.yaml").prompts != DEFAULT_PROMPTS
    assert {path.stem for path in SHIPPED.iterdir()} == {"plain", "synonyms"}


KEYS = "templates, class_names, articles"
PLACE = "templates: expected exactly one {} in each, and no other brace, found"
PRINTABLE = "expected printable text without spaces at its ends, found"
APART = "class_names: expected names that tell classes apart, found"
# A file's text; what is said of it behind its name, and the hint.
MISTAKES: dict[str, tuple[str, str, str | None]] = {
    "an unknown key": ("template: []", f"unknown key 'template'; expected {KEYS}", "did you mean templates?"),
    "a key that is no text": ("1: []", f"unknown key 1; expected {KEYS}", None),
    "no mapping": ("- a photo of {}.", f"expected the keys {KEYS}, found a list", "quotes"),
    "a byte that is no text": ("a: \x00", "cannot be read as YAML: unacceptable character #x0000", None),
    "no end of nesting": ("[" * 5000, "cannot be read as YAML: maximum recursion depth exceeded", None),
    "a date that is none": ("2007-99-99: a", "cannot be read as YAML: month must be in 1..12", None),
    "templates that are no list": ("templates: a {}.", "templates: expected a list of texts, found 'a {}.'", "quotes"),
    "no templates": ("templates: []", "templates: expected at least one text, found an empty list", "quotes"),
    "templates left open": ("templates:", "templates: expected a list of texts, found nothing", "quotes"),
    "a number": ("templates: [3]", "templates: expected text, found a value of type int", "quotes"),
    "no place": ("templates: [a photo]", f"{PLACE} 'a photo'", "quotes"),
    "two places": ("templates: ['{} {}']", f"{PLACE} '{{}} {{}}'", "quotes"),
    "a named place": ("templates: ['{name} {}']", f"{PLACE} '{{name}} {{}}'", "quotes"),
    "an escaped place": ("templates: ['a {{}}']", f"{PLACE} 'a {{{{}}}}'", "quotes"),
    "a template twice": (
        "templates: ['a {}', 'a {}']", "templates: expected every text once, found 'a {}' 2 times", None,
    ),
    "an empty template": ("templates: ['']", f"templates: {PRINTABLE} ''", "quotes"),
    "what cannot be printed": ('templates: ["a {}\\n"]', f"templates: {PRINTABLE} 'a {{}}\\n'", "quotes"),
    "names that are no mapping": ("class_names: [cat]", "class_names: expected names by VOC class, found a list", None),
    "an unknown class": (
        "class_names: {tv_monitor: tv}",
        f"class_names: expected one of the VOC classes ({', '.join(VOC_CLASSES)}), found 'tv_monitor'",
        "did you mean tvmonitor?",
    ),
    "a name that is no text": (
        "class_names: {cat: yes}", "class_names.cat: expected a text or a list of texts, found true", None,
    ),
    "no name": ("class_names: {cat: []}", "class_names.cat: expected at least one text, found an empty list", None),
    "no text among names": ("class_names: {cat: [a, {b: c}]}", "class_names.cat: expected text, found a mapping", None),
    "a name twice": ("class_names: {cat: [a, a]}", "class_names.cat: expected every text once, found 'a' 2", None),
    "spaces around a name": ("class_names: {cat: ' cat'}", f"class_names.cat: {PRINTABLE} ' cat'", None),
    "one name of two classes": ("class_names: {cat: [pet, cat], dog: pet}", f"{APART} 'pet' for cat and dog", None),
    "another class's usual name": ("class_names: {train: bus}", f"{APART} 'bus' for bus and train", None),
    "articles that are no switch": ("articles: a", "articles: expected true or false, found 'a'", None),
}  # fmt: skip


def refusal(file: Path, text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        prompts_of(file, text)
    return caught.value


@pytest.mark.parametrize(("text", "message", "hint"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_by_file_and_key(file: Path, text: str, message: str, hint: str | None) -> None:
    error = refusal(file, text)
    assert error.message == f"{file}: {message}" or (hint is None and error.message.startswith(f"{file}: {message}"))
    quotes = 'put every template into quotes: templates: ["a photo of {}."]'
    assert error.hint == (quotes if hint == "quotes" else hint)


@pytest.mark.parametrize(
    ("text", "line", "message", "quotes"),
    [
        ("articles: true\ntemplates: ['a {}", 2, "found unexpected end of stream", True),
        ("templates: [a photo of {}.]", 1, "expected ',' or ']', but got '{'", True),
        ("articles: true\nclass_names:\n  cat: a\n  cat: b", 4, "cat is given twice", False),
        ("!!python/object/apply:os.system ['true']", 1, "could not determine a constructor for the tag", False),
    ],
    ids=["a quote left open", "a template without quotes", "a key twice", "a program"],
)
def test_what_is_no_plain_yaml_is_told_by_line(file: Path, text: str, line: int, message: str, quotes: bool) -> None:
    error = refusal(file, text)
    assert error.message.startswith(f"{file}, line {line}: cannot be read as YAML: {message}")
    assert (error.hint is not None) == quotes


def test_many_aliases_do_not_make_a_long_message(file: Path) -> None:
    levels = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    levels += [
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    assert len(str(refusal(file, "\n".join(levels)))) < 300
    assert "expected text, found a list" in str(refusal(file, "templates: [&a [x], *a, *a]"))


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: expected a prompt file, found no such file"):
        read_prompts(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="expected a prompt file, found a folder"):
        read_prompts(tmp_path)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match="expected a prompt file, found no such file"):
        read_prompts(tmp_path / "pipe.yaml")


def test_a_file_that_may_not_be_read_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("articles: true")
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UsageError, match=r"cannot be read \(Permission denied\)"):
        read_prompts(file)


def test_a_file_of_any_length_is_not_read_whole(file: Path) -> None:
    file.write_bytes(b"#" * 1_000_001)
    with pytest.raises(UsageError, match="at most 1,000,000 bytes"):
        read_prompts(file)


def test_text_that_is_not_utf_8_is_told(file: Path) -> None:
    file.write_bytes(b"templates: ['\xff {}']")
    with pytest.raises(UsageError, match="cannot be read as YAML"):
        read_prompts(file)
