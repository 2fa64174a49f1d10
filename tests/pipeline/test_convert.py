"""`convert-cache` through the command line: what it prints, what it records, how it ends."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cli
from cache.catalog import read_catalog
from cache.commands import derivation_command
from cache.convert import Conversion, ConvertedView
from cache.fidelity import Fidelity
from cache.repair import Repair
from pipeline.convert import ConvertConfig, conversion_lines, conversion_table
from tests.command_line import run

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ("--pca", "16", "--dtype", "int8")


@pytest.fixture(scope="module")
def derived(store: Path, devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 16 components in int8. Shared by the tests of this module: read only."""
    out = tmp_path_factory.mktemp("derived") / "small.zarr"
    done = run("convert-cache", store, out, *SMALL, "--fit-set", "2007:train", "--voc-root", devkit)
    assert done.code == 0, done.err
    (out.parent / "stdout.txt").write_text(done.out)
    (out.parent / "stderr.txt").write_text(done.err)
    return out


def basis_digest(store: Path) -> str:
    pca = read_catalog(store).teachers["tiny_dino"].manifest.pca
    assert pca is not None
    return pca.sha256


class TestOutput:
    def test_the_table_says_what_was_saved_and_lost_at_80_columns(self, store: Path, derived: Path) -> None:
        lines = (derived.parent / "stdout.txt").read_text().splitlines()
        table = lines[: next(n for n, line in enumerate(lines) if line.startswith("total")) + 1]
        assert max(map(len, table)) <= 80
        row = next(line.split() for line in table if line.startswith("tiny_dino") and "hflip" in line)
        # 12 images of 900 tokens in shards of 4: 64 float16 before, 16 int8 after with a float32 scale each, checksums
        before = 12 * (900 * 64 * 2 + 4) + 3 * (4 * 16 + 4) + 3 * (4 * 2 * 64 * 4 + 4)
        after = 12 * (900 * 16 + 4) + 3 * (4 * 16 + 4) + 3 * (4 * (2 * 16 + 16 + 900) * 4 + 3 * 4)
        assert row[2:7] == [f"{before / 1e6:.1f}", "MB", f"{after / 1e3:.1f}", "kB", f"{1 - after / before:.1%}"]
        (note,) = [n for n in _notes(derived, "tiny_dino/hflip/features") if "fidelity" in n]
        assert (note["bytes_before"], note["bytes_after"]) == (before, after)
        assert float(row[7]) == pytest.approx(note["fidelity"]["cosine_mean"], abs=1e-5)
        assert float(row[9]) == pytest.approx(note["fidelity"]["relative_error"], abs=1e-4)
        logits = next(line.split() for line in table if line.startswith("tiny_clip"))
        assert logits[6:] == ["0.0%", "–", "–", "–", "–"]

    def test_the_lines_below_say_what_comes_next(self, store: Path, derived: Path) -> None:
        said = (derived.parent / "stdout.txt").read_text()
        assert "tiny_dino: 16 of 64 components hold " in said
        assert f"fidelity: of what is read from {derived} to what is read from {store}, 12 images" in said
        assert "48 targets converted in" in said
        assert f"next: python cli.py train --voc-set 2007:train --cached-teachers {derived}\n" in said

    def test_progress_goes_to_stderr(self, derived: Path) -> None:
        said = (derived.parent / "stderr.txt").read_text()
        for what in (
            "fitting the PCA of tiny_dino: 12/12 images",
            "converting: 48/48 targets",
            "measuring: 24/24 samples",
        ):
            assert what in said

    def test_running_it_again_says_that_nothing_is_left_to_do(self, store: Path, derived: Path) -> None:
        done = run("convert-cache", store, derived, *SMALL)  # all its images are those of the fit set
        assert (done.code, done.err) == (0, "the store is complete: nothing to do\n")
        assert "0 targets converted" in done.out
        first = (derived.parent / "stdout.txt").read_text().splitlines()
        assert done.out.splitlines()[:8] == first[:8]  # the table, fidelity read back

    def test_a_derived_store_is_a_store(self, derived: Path) -> None:
        done = run("inspect-cache", derived, "--verify")
        assert done.code == 0
        assert "complete" in done.out

    def test_long_names_and_growth_fit_80_columns(self) -> None:
        from io import StringIO

        from rich.console import Console

        fidelity = Fidelity(
            samples=512, cosine_mean=0.99997, cosine_p01=-0.99995, relative_error=None, explained_variance=-1.25
        )
        view = ConvertedView(
            "a-teacher-whose-name-is-as-long-as-names-may-be", "original", 123_456_789, 999_999_999, fidelity
        )
        repairs = [Repair("dino/hflip/features", 3, "0" * 64, "1" * 64)]
        done = Conversion(Path("a"), Path("b c"), ("2007:train", "2012:val"), 7, 7, 7, 1.0, [view], {}, repairs)
        console = Console(width=80, file=StringIO())
        console.print(conversion_table(done))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, shown.splitlines())) <= 80
        assert shown.count("…") == 0
        for words in ("1000.0 MB", "-710.0%", "0.99997", "-0.99995", "-1.25000", "–"):
            assert words in shown
        lines = conversion_lines(done)
        assert "repaired dino/hflip/features, shard 3: OTHER BYTES than before; noted in its provenance" in lines
        assert (
            lines[-1]
            == "next: python cli.py train --voc-set 2007:train --voc-set 2012:val --limit 7 --cached-teachers 'b c'"
        )


def _notes(store: Path, array: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / array / "provenance.jsonl").read_text().splitlines()]


class TestFitSet:
    def test_images_that_the_store_lacks_are_left_out_and_said(
        self, store: Path, devkit: Path, derived: Path, tmp_path: Path
    ) -> None:
        fit = ("--fit-set", "2007:val", "--fit-set", "2007:train", "--voc-root", devkit)
        done = run("convert-cache", store, tmp_path / "d.zarr", *SMALL, *fit)
        assert done.code == 0
        assert f"--fit-set: 12 of its 18 images are in {store}: the PCA is fitted on these" in done.err
        assert basis_digest(tmp_path / "d.zarr") == basis_digest(derived)

    def test_a_set_without_images_in_the_store_is_a_usage_error(
        self, store: Path, devkit: Path, tmp_path: Path
    ) -> None:
        fit = ("--fit-set", "2007:val", "--voc-root", devkit)
        done = run("convert-cache", store, tmp_path / "d.zarr", *SMALL, *fit)
        assert done.code == 2
        assert f"--fit-set: none of its 6 images is in {store}, which holds 12 images of 2007:train" in done.err

    def test_a_set_that_is_not_there_is_said(self, store: Path, devkit: Path, tmp_path: Path) -> None:
        fit = ("--fit-set", "2012:train", "--voc-root", devkit)
        done = run("convert-cache", store, tmp_path / "d.zarr", *SMALL, *fit)
        assert (done.code, "VOC2012" in done.err) == (1, True)

    def test_it_means_nothing_without_a_pca(self, store: Path, tmp_path: Path) -> None:
        done = run("convert-cache", store, tmp_path / "d.zarr", "--fit-set", "2007:train")
        assert done.code == 2
        assert "next: add --pca R" in done.err


class TestCommand:
    @pytest.mark.parametrize(
        "config",
        [
            ConvertConfig(Path("a.zarr"), Path("b.zarr")),
            ConvertConfig(
                Path("a b.zarr"), Path("it's.h5"), "int8", 256, ("2007:train", "2012:val"), Path("my voc"),
                ("dino", "clip"), ("hflip",), "hdf5", 32,
            ),
        ],
        ids=["nothing but the stores", "everything"],
    )  # fmt: skip
    def test_the_recorded_command_asks_for_the_same(self, config: ConvertConfig) -> None:
        words = shlex.split(config.command())
        assert words[:3] == ["python", "cli.py", "convert-cache"]
        asked = cli.cli.commands["convert-cache"].make_context("convert-cache", words[3:]).params
        assert {name: value for name, value in asked.items() if name != "debug"} == dataclasses.asdict(config)

    def test_the_stores_own_command_resumes_it(self, store: Path, derived: Path) -> None:
        command = derivation_command(read_catalog(derived))
        assert command is not None
        assert command.startswith(f"python cli.py convert-cache {store} {derived} --dtype int8 --pca 16")
        done = run(*shlex.split(command)[2:])
        assert done.code == 0
        assert "nothing to do" in done.err


class TestEnd:
    def test_it_needs_no_torch_and_no_zarr(self, store: Path, tmp_path: Path) -> None:
        script = "import sys, cli; code = cli.main(); print({'torch', 'zarr'} & set(sys.modules)); sys.exit(code)"
        done = subprocess.run(
            [sys.executable, "-c", script, "convert-cache", store, tmp_path / "d.zarr", *SMALL, "--view", "original"],
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()"), done.stderr

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--pca", "0"], 2, "--pca"),
            (["--pca", "65"], 2, "--pca: expected 1 to 64 components of tiny_dino, found 65"),
            (["--teacher", "tiny_clip", "--pca", "4"], 2, "teachers with features: tiny_dino"),
            (["--teacher", "dino"], 2, "it has tiny_clip, tiny_dino"),
            (["--view", "vflip"], 2, "'vflip' is not one of 'original', 'hflip'"),
            (["--dtype", "float8"], 2, "'float8' is not one of"),
        ],
        ids=str,
    )
    def test_what_cannot_be_asked_ends_with_its_code(
        self, store: Path, tmp_path: Path, options: list[str], code: int, message: str
    ) -> None:
        done = run("convert-cache", store, tmp_path / "d.zarr", *options)
        assert (done.code, done.out) == (code, "")
        assert message in done.err
        assert not (tmp_path / "d.zarr").exists()

    def test_stores_that_do_not_fit_end_with_their_codes(self, store: Path, derived: Path, tmp_path: Path) -> None:
        assert run("convert-cache", tmp_path / "none.zarr", tmp_path / "d.zarr").code == 3
        assert run("convert-cache", store, store).code == 2
        other = run("convert-cache", store, derived, "--pca", "8", "--dtype", "int8")
        assert (other.code, "tiny_dino.pca.shape: stored [17,64], found [9,64]" in other.err) == (3, True)
        (tmp_path / "file").write_bytes(b"x")
        assert run("convert-cache", store, tmp_path / "file").code == 1
        copy = Path(shutil.copytree(store, tmp_path / "copy.zarr"))
        (copy / "tiny_dino/original/features/ledger.jsonl").unlink()
        done = run("convert-cache", copy, tmp_path / "d.zarr")
        assert (done.code, "tiny_dino/original/features: 12 of 12 missing" in done.err) == (3, True)

    def test_a_damaged_shard_is_repaired(self, store: Path, derived: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(derived, tmp_path / "copy.zarr"))
        shard = next((copy / "tiny_dino/hflip/features/c").rglob("1/0/0/0"))
        shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
        assert run("inspect-cache", copy, "--verify").code == 3
        done = run("convert-cache", store, copy, *SMALL, "--repair")
        assert done.code == 0
        assert "repaired tiny_dino/hflip/features, shard 1: the same bytes\n" in done.out
        assert run("inspect-cache", copy, "--verify").code == 0
