"""A student beside stored teachers: every figure against one computed another way, and words where there is none."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor

import features.tiny
from cache.reader import TeacherStore, read_features
from cache.selection import Selection
from cli import cli
from data.errors import StoreIncompleteError, StoreStaleError, UsageError
from data.records import ImageRecord
from data.voc import read_voc
from evaluation.agreement import REGIONS, cell_regions
from evaluation.agreement_table import Agreement
from pipeline.agreement import measure_agreement
from pipeline.agreement_targets import AgreementRequest, AgreementTargets
from pipeline.checkpoint import Checkpoint, save_checkpoint
from pipeline.config import Distillation
from pipeline.dataset import TrainingImages, collate_loaded, plain_batches
from pipeline.extract import extract
from pipeline.stored_targets import StoredTargets
from pipeline.trainer import Trainer
from students.losses.binary_kl import binary_kl
from students.losses.logit_kl import logit_kl
from tests.pipeline.small_runs import extraction, from_store, small_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def val_store(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract(extraction(devkit, tmp_path_factory.mktemp("val") / "val.zarr", voc_sets=("2007:val",))).store


@pytest.fixture(scope="module")
def val_records(devkit: Path) -> list[ImageRecord]:
    return read_voc(devkit, ("2007:val",))


@pytest.fixture(scope="module")
def distilled(devkit: Path, store: Path, records: list[ImageRecord]) -> Checkpoint:
    """With everything on."""
    return checkpoint_of(devkit, records, from_store(store))


@pytest.fixture(scope="module")
def whole(distilled: Checkpoint, val_store: Path, val_records: list[ImageRecord]) -> Agreement:
    """Of the same checkpoint, held out."""
    return agreement_of(distilled, val_store, val_records)


def checkpoint_of(
    devkit: Path, records: list[ImageRecord], distillation: Distillation, *, resumable: bool = True
) -> Checkpoint:
    """What a run of the first four training images starts from: nothing here depends on how well it was trained."""
    config = small_run(devkit, Path("unused"), limit=4, distillation=distillation).resolved()
    source = StoredTargets(distillation, records[:4], ("original",), CPU) if distillation.stores else None
    return Trainer(config, records[:4], CPU, source).checkpoint(1, [], resumable=resumable)


def agreement_of(
    checkpoint: Checkpoint, store: Path, records: list[ImageRecord], voc_root: Path | None = None, **named: str
) -> Agreement:
    targets = AgreementTargets(AgreementRequest((store,), **named), checkpoint, records, ("2007:val",))
    student, root = checkpoint.build_student(CPU), voc_root or checkpoint.config.voc_root
    return measure_agreement(checkpoint, student, records, targets, CPU, voc_root=root)


def lines_of(agreement: Agreement) -> list[str]:
    """The tables as a terminal of 80 columns shows them."""
    console = Console(width=80, file=io.StringIO(), markup=False)
    console.print(*agreement.tables())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def seen(checkpoint: Checkpoint, records: list[ImageRecord]) -> tuple[Tensor, Tensor, Tensor]:
    """What the student makes of the images: its map before and behind the neck, and its logits."""
    student = checkpoint.build_student(CPU)
    images = TrainingImages(records)
    (keys,) = plain_batches(len(records), len(records))
    frames = collate_loaded([images.load(key) for key in keys]).batch.images_float()
    with torch.no_grad():
        return *student.tapped_maps(frames), student.distillation_maps(frames)[1]


def stored(store: Path, records: list[ImageRecord], teacher: str, name: str) -> Tensor:
    opened = TeacherStore(store)
    rows = [opened.row_of_id[record.id] for record in records]
    if name == "logits":
        return torch.from_numpy(opened.array(teacher, "original", name).gather(rows))
    return torch.from_numpy(np.stack([read_features(opened, teacher, "original", row) for row in rows]))


@pytest.mark.parametrize("tap", ["backbone", "neck"])
def test_cosines_are_those_of_the_adapted_map_and_the_training_target(
    devkit: Path,
    store: Path,
    val_store: Path,
    records: list[ImageRecord],
    val_records: list[ImageRecord],
    distilled: Checkpoint,
    whole: Agreement,
    tap: str,
) -> None:
    checkpoint, agreement = distilled, whole
    if tap == "neck":
        checkpoint = checkpoint_of(devkit, records, from_store(store, feature_tap="neck"))
        agreement = agreement_of(checkpoint, val_store, val_records)
    found = agreement.features
    assert found is not None
    assert found.cosine is not None
    assert (found.tap, found.teacher, found.why_no_cosine) == (tap, "tiny_dino", None)

    training = [record.id for record in records[:4]]
    mean, std = (
        torch.from_numpy(s) for s in Selection([TeacherStore(store)], training).channel_statistics("tiny_dino")
    )
    target = (stored(val_store, val_records, "tiny_dino", "features") - mean) / std
    maps = dict(zip(("backbone", "neck"), seen(checkpoint, val_records)[:2], strict=True))
    assert checkpoint.training is not None
    weights = checkpoint.training["objective"]
    adapted = torch.einsum("bphw,cp->bhwc", maps[tap], weights["adapter.projection.weight"][:, :, 0, 0])
    expected = F.cosine_similarity(adapted + weights["adapter.projection.bias"], target, dim=3)
    regions = torch.from_numpy(np.stack([cell_regions(record, (30, 30)) for record in val_records], axis=1))
    for name, inside in zip(REGIONS, regions, strict=True):
        cosine = found.cosine[name]
        if not inside.any():
            assert cosine is None
            continue
        assert cosine is not None
        assert cosine.cells == int(inside.sum())
        assert cosine.mean == pytest.approx(float(expected[inside].mean()), abs=1e-5)
    assert found.cosine["person"] is not None or found.cosine["cat"] is not None


def test_a_map_that_is_the_target_agrees_entirely_and_its_shuffled_control_does_not(
    distilled: Checkpoint, val_store: Path, val_records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = distilled
    assert checkpoint.training is not None
    state = checkpoint.training["objective"]
    features, _, _ = seen(checkpoint, val_records)
    adapted = torch.einsum("bphw,cp->bhwc", features, state["adapter.projection.weight"][:, :, 0, 0])
    taught = adapted * state["std"] + state["mean"]
    monkeypatch.setattr(AgreementTargets, "features", lambda _, positions: taught[list(positions)])
    found = agreement_of(checkpoint, val_store, val_records).features
    assert found is not None
    assert found.cosine is not None
    cosine = found.cosine["all"]
    assert cosine is not None
    assert cosine.shuffled is not None
    assert cosine.p1 > 0.9999
    assert cosine.shuffled < 0.99
    assert found.cka is not None
    assert found.cka_shuffled is not None
    assert found.cka_shuffled < found.cka


@pytest.mark.parametrize("loss", ["kl", "binary"])
def test_kl_is_the_training_loss_on_these_images(
    devkit: Path,
    store: Path,
    records: list[ImageRecord],
    val_store: Path,
    val_records: list[ImageRecord],
    distilled: Checkpoint,
    whole: Agreement,
    loss: str,
) -> None:
    teacher = stored(val_store, val_records, "tiny_clip", "logits")
    if loss == "kl":
        found, expected = whole.logits, logit_kl(seen(distilled, val_records)[2], teacher, 2.0)
    else:
        checkpoint = checkpoint_of(devkit, records, from_store(store, logit_loss="binary", temperature=3.0))
        assert checkpoint.training is not None
        centre = checkpoint.training["objective"]["centre"]
        found = agreement_of(checkpoint, val_store, val_records).logits
        expected = binary_kl(seen(checkpoint, val_records)[2], teacher, 3.0, centre)
    assert found is not None
    assert found.kl == pytest.approx(float(expected), rel=1e-4)
    assert found.divergence == loss


class TestHeldOut:
    def test_images_that_were_not_trained_on(self, whole: Agreement) -> None:
        assert (whole.trained_on, whole.held_out, whole.images) == (0, True, 6)
        assert (whole.logit_teacher, whole.untrained) == ("tiny_clip", ["tiny_dino", "tiny_clip"])
        assert whole.to_json()["held_out"] is True

    def test_images_that_were_trained_on(self, distilled: Checkpoint, store: Path, records: list[ImageRecord]) -> None:
        """The run's four, not all of its set."""
        found = agreement_of(distilled, store, records[2:6])
        assert (found.trained_on, found.held_out, found.images) == (2, False, 4)
        assert "NOT held out, it was trained on 2 of them" in lines_of(found)[1]

    def test_sets_that_are_not_there_leave_it_open(
        self, distilled: Checkpoint, store: Path, records: list[ImageRecord], tmp_path: Path
    ) -> None:
        found = agreement_of(distilled, store, records[:1], voc_root=tmp_path)
        assert (found.trained_on, found.held_out) == (None, None)


class TestWithoutAnAdapter:
    @pytest.mark.parametrize(
        ("arm", "why"),
        [
            ("baseline", "is a baseline"),
            ("logits only", r"without features \(β = 0\)"),
            ("best", r"give the run's student_latest\.pth"),
        ],
    )
    def test_cka_is_there_and_why_cosines_are_not(
        self,
        devkit: Path,
        store: Path,
        records: list[ImageRecord],
        val_store: Path,
        val_records: list[ImageRecord],
        distilled: Checkpoint,
        whole: Agreement,
        arm: str,
        why: str,
    ) -> None:
        """All start from the same student, so all have the same CKA."""
        checkpoint = {
            "baseline": lambda: checkpoint_of(devkit, records, Distillation()),
            "logits only": lambda: checkpoint_of(devkit, records, from_store(store, beta=0)),
            "best": lambda: dataclasses.replace(distilled, training=None),
        }[arm]()
        agreement = agreement_of(checkpoint, val_store, val_records)
        found = agreement.features
        assert found is not None
        assert whole.features is not None
        assert found.cosine is None
        assert found.why_no_cosine is not None
        assert re.search(why, found.why_no_cosine)
        assert any("no cosine: " in line for line in lines_of(agreement))
        assert whole.features.cka is not None
        assert found.cka == pytest.approx(whole.features.cka, abs=1e-9)
        assert 0 < found.cka < 1

    def test_another_teacher_under_the_key_is_told_by_its_field(
        self,
        devkit: Path,
        distilled: Checkpoint,
        val_records: list[ImageRecord],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        identity = features.tiny.TinyDinoTeacher.identity
        monkeypatch.setattr(features.tiny.TinyDinoTeacher, "identity", lambda t: {**identity(t), "layer": "one before"})
        other = extract(extraction(devkit, tmp_path / "s.zarr", voc_sets=("2007:val",), teachers=("tiny_dino",))).store
        found = agreement_of(distilled, other, val_records[:2])
        assert found.features is not None
        assert found.features.why_no_cosine is not None
        assert "layer: then" in found.features.why_no_cosine
        assert "now one before" in found.features.why_no_cosine
        assert found.why_no_logits == "no teacher of the store has logits"

    @pytest.mark.slow
    def test_components_of_another_basis_are_not_compared(
        self, devkit: Path, store: Path, records: list[ImageRecord], val_store: Path, tmp_path: Path
    ) -> None:
        val_records = read_voc(devkit, ("2007:val",))
        small = []
        for path in (store, val_store):
            small.append(tmp_path / f"small-{path.name}")
            result = CliRunner().invoke(cli, ["convert-cache", str(path), str(small[-1]), "--pca", "4"])
            assert result.exit_code == 0, result.output
        checkpoint = checkpoint_of(devkit, records, from_store(small[0]))
        same = agreement_of(checkpoint, small[0], records[:4]).features
        other = agreement_of(checkpoint, small[1], val_records[:2]).features
        assert same is not None
        assert other is not None
        assert same.cosine is not None
        assert other.cosine is None
        assert other.why_no_cosine == "the store holds tiny_dino on another PCA basis than in training"


class TestWithoutATaughtHead:
    def test_a_baselines_logits_mean_nothing(
        self, devkit: Path, records: list[ImageRecord], val_store: Path, val_records: list[ImageRecord]
    ) -> None:
        found = agreement_of(checkpoint_of(devkit, records, Distillation()), val_store, val_records[:1])
        assert found.logits is None
        assert found.why_no_logits == "the student's auxiliary head was never trained (γ = 0)"

    def test_a_head_trained_on_labels_has_no_kl(
        self, devkit: Path, store: Path, records: list[ImageRecord], val_store: Path, val_records: list[ImageRecord]
    ) -> None:
        labels = from_store(store, logit_targets="labels")
        found = agreement_of(checkpoint_of(devkit, records, labels), val_store, val_records[:2])
        assert found.logits is not None
        assert found.logits.kl is None
        assert found.logits.student_map is not None
        assert "labels" in found.logit_note

    def test_binary_kl_needs_the_centre(
        self, devkit: Path, store: Path, records: list[ImageRecord], val_store: Path, val_records: list[ImageRecord]
    ) -> None:
        binary = from_store(store, logit_loss="binary")
        found = agreement_of(checkpoint_of(devkit, records, binary, resumable=False), val_store, val_records[:1])
        assert found.logits is None
        assert found.why_no_logits is not None
        assert "student_latest.pth" in found.why_no_logits


class TestStores:
    def test_the_hint_of_missing_images_extracts_them(
        self, distilled: Checkpoint, store: Path, val_records: list[ImageRecord], tmp_path: Path
    ) -> None:
        checkpoint = distilled
        with pytest.raises(StoreIncompleteError, match="6 of 6 images are not in the store") as caught:
            agreement_of(checkpoint, store, val_records)
        assert caught.value.exit_code == 3
        assert caught.value.hint is not None
        command, then = caught.value.hint.splitlines()
        words = shlex.split(command.partition("python cli.py ")[2])
        place = words.index("--out") + 1
        assert then.strip() == f"then add --agreement {words[place]}"
        words[place] = str(tmp_path / "val.zarr")
        result = CliRunner().invoke(cli, [*words, "--device", "cpu", "--workers", "0"])
        assert result.exit_code == 0, result.output
        request = AgreementRequest((store, tmp_path / "val.zarr"), logit_teacher="tiny_clip")
        with pytest.raises(StoreIncompleteError, match="tiny_clip"):  # the next one that lacks is told in its turn
            AgreementTargets(request, checkpoint, val_records, ("2007:val",))

    def test_an_image_that_changed_is_refused(
        self, distilled: Checkpoint, store: Path, records: list[ImageRecord], tmp_path: Path
    ) -> None:
        changed = tmp_path / "x.jpg"
        changed.write_bytes(records[0].image_path.read_bytes() + b"\0")
        record = ImageRecord(
            records[0].id, changed, records[0].annotation_path, records[0].image_size, records[0].target
        )
        with pytest.raises(StoreStaleError, match="changed since the teachers saw it"):
            agreement_of(distilled, store, [record])

    @pytest.mark.parametrize(
        ("named", "message"),
        [
            ({"feature_teacher": "dinov2"}, "--feature-teacher dinov2: .* has no features of it .*: tiny_dino"),
            ({"logit_teacher": "tiny_dino"}, "--logit-teacher tiny_dino: .* has no logits of it .*: tiny_clip"),
        ],
        ids=["unknown", "of another kind"],
    )
    def test_a_teacher_that_is_not_there_is_refused(
        self, distilled: Checkpoint, store: Path, records: list[ImageRecord], named: dict[str, str], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            agreement_of(distilled, store, records, **named)

    def test_one_image_has_no_shuffled_control(
        self, distilled: Checkpoint, store: Path, records: list[ImageRecord]
    ) -> None:
        found = agreement_of(distilled, store, records[:1])
        assert found.features is not None
        assert found.features.cosine is not None
        assert found.features.cosine["all"] is not None
        assert found.features.cosine["all"].shuffled is None
        assert found.features.cka_shuffled is None
        assert found.logits is not None
        assert found.logits.kl_shuffled is None


class TestCommand:
    @pytest.mark.slow
    def test_eval_prints_and_draws_both(
        self, devkit: Path, distilled: Checkpoint, whole: Agreement, val_store: Path, tmp_path: Path
    ) -> None:
        save_checkpoint(tmp_path / "student_latest.pth", distilled)
        asked = ["--checkpoint", tmp_path / "student_latest.pth", "--agreement", val_store, "--workers", 0]
        drawn = ["--device", "cpu", "--visualize", 1, "--out", tmp_path / "pictures", "--json"]
        result = CliRunner().invoke(cli, ["eval", *map(str, [*asked, *drawn])])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["agreement"] == json.loads(json.dumps(whole.to_json()))
        (features,) = (tmp_path / "pictures").glob("*-features.png")
        assert features.with_name(features.name.replace("-features", "")).is_file()
        assert (tmp_path / "pictures" / "precision-recall.png").is_file()
        assert "pictures of features: 1" in result.stderr

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--detections", "d", "--agreement", "s.zarr"], "--agreement goes with --checkpoint"),
            (["--checkpoint", "c.pth", "--logit-teacher", "x"], "give it as --agreement STORE"),
        ],
        ids=["detections", "no store"],
    )
    def test_options_that_do_not_go_together(self, words: list[str], message: str) -> None:
        result = CliRunner().invoke(cli, ["eval", *words])
        assert result.exit_code == 2
        assert message in result.stderr


def test_tables_fit_and_say_what_the_figures_are(whole: Agreement) -> None:
    lines = lines_of(whole)
    assert max(map(len, lines)) <= 80
    assert lines[1] == "Agreement with the teachers, 6 images: held out"
    assert lines[2] == "UNTRAINED teachers: tiny_dino, tiny_clip"
    assert whole.features is not None
    assert whole.features.cosine is not None
    cosine = whole.features.cosine["all"]
    assert cosine is not None
    (row,) = (line.split() for line in lines if "all cells" in line)
    assert row[-5:] == ["5,400", *(f"{value:.3f}" for value in (cosine.mean, cosine.p1, cosine.p50, cosine.shuffled))]
