"""Where targets are held, and whether they are gathered ahead, changes no bit of a run."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.device_arrays
import pipeline.stored_targets
from data.errors import StoreCorruptError, UsageError
from data.geometry import VIEWS, View
from data.records import ImageRecord
from pipeline.config import Residency
from pipeline.extract import extract
from pipeline.stored_targets import StoredTargets
from pipeline.train import train
from tests.pipeline.small_runs import equal, extraction, from_store, load, small_run, stored_targets, weights_of

ORDER: list[View] = ["hflip", "original", "original", "hflip"]
RESIDENCIES: tuple[Residency, ...] = ("mmap", "ram", "device")


@pytest.fixture(scope="module")
def store8(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training images' targets, features as int8."""
    return extract(extraction(devkit, tmp_path_factory.mktemp("int8") / "s.zarr", dtype="int8")).store


class TestResidency:
    """Where targets are held changes no bit of them."""

    @pytest.mark.parametrize("residency", RESIDENCIES)
    @pytest.mark.parametrize("kind", ["store", "store8"])
    def test_targets_are_the_same(
        self, kind: str, residency: Residency, records: list[ImageRecord], request: pytest.FixtureRequest
    ) -> None:
        path = request.getfixturevalue(kind)
        chosen = [records[7], records[0], records[3], records[3]]
        source = stored_targets(path, records=records, residency=residency)
        found = source(load(chosen, ORDER))
        expected = stored_targets(path, records=records)(load(chosen, ORDER))
        assert found.features is not None
        assert expected.features is not None
        assert torch.equal(found.features, expected.features)
        assert found.features.dtype == expected.features.dtype
        assert torch.equal(found.logits, expected.logits)  # type: ignore[arg-type]

    def test_weights_are_the_same(self, devkit: Path, store8: Path, tmp_path: Path) -> None:
        base = small_run(devkit, tmp_path, distillation=from_store(store8), evaluate="final-only", limit=2)
        weights = []
        for residency in RESIDENCIES:
            config = base.model_copy(update={"run_name": residency, "residency": residency})
            assert train(config)["config"]["residency"] == residency
            weights.append(weights_of(config))
        assert equal(weights[0], weights[1])
        assert equal(weights[0], weights[2])

    def test_losses_without_weight_hold_nothing(self, store: Path, records: list[ImageRecord]) -> None:
        for residency in RESIDENCIES:
            source = stored_targets(store, records=records, residency=residency, beta=0, gamma=0)
            assert source(load(records[:2], ["original", "hflip"])).features is None

    @pytest.mark.parametrize("residency", ["ram", "device"])
    def test_what_does_not_fit_is_refused_with_its_size(
        self, store: Path, records: list[ImageRecord], residency: Residency, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (pipeline.stored_targets, pipeline.device_arrays):
            monkeypatch.setattr(module, "available_memory", lambda: 2_000_000)
        # Twelve images in two views: 30 × 30 × 64 halves and 20 singles each; shards carry checksums besides.
        needed = 12 * 2 * (30 * 30 * 64 * 2 + 20 * 4)
        shown = {"ram": "2.8 MB, and 2.0 MB are free", "device": f"{needed / 1e6:.1f} MB, and 1.8 MB are free"}
        message = rf"--residency {residency}: the targets of this run take {shown[residency]}\n  next: .*mmap"
        with pytest.raises(UsageError, match=message) as caught:
            stored_targets(store, records=records, residency=residency)
        assert caught.value.exit_code == 2

    def test_progress_is_shown_in_megabytes(
        self, store: Path, records: list[ImageRecord], capsys: pytest.CaptureFixture[str]
    ) -> None:
        stored_targets(store, records=records, residency="ram")
        assert "reading targets into memory: 3/3 MB" in capsys.readouterr().err
        stored_targets(store, records=records, residency="device")
        assert "copying targets to cpu: 3/3 MB" in capsys.readouterr().err


class TestAhead:
    @pytest.mark.slow
    def test_no_result_depends_on_gathering_ahead(
        self, devkit: Path, store8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Seven images in four batches, the last one short, over two epochs."""
        recipe = {"epochs": 2, "batch_size": 2}
        base = small_run(
            devkit, tmp_path, distillation=from_store(store8), limit=7, recipe=recipe, evaluate="final-only"
        )
        result = train(base)

        @contextmanager
        def nothing_ahead(*_: Any) -> Iterator[None]:
            yield

        monkeypatch.setattr(StoredTargets, "following", nothing_ahead)
        plain = base.model_copy(update={"run_name": "plain"})
        assert train(plain)["last"]["losses"] == result["last"]["losses"]
        assert equal(weights_of(plain), weights_of(base))

    def test_damage_that_is_met_ahead_is_told_by_the_step(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(store, tmp_path / "s.zarr"))
        for shard in copy.glob("tiny_dino/*/features/c/0/0/0/0"):
            damaged = bytearray(shard.read_bytes())
            damaged[100] ^= 1
            shard.write_bytes(bytes(damaged))
        with pytest.raises(StoreCorruptError, match="shard 0, sample 0: checksum fails"):
            train(small_run(devkit, tmp_path, distillation=from_store(copy), limit=3))


@pytest.mark.gpu
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_gpu_decodes_what_the_cpu_decodes(store8: Path, records: list[ImageRecord], residency: Residency) -> None:
    loaded = load([records[7], records[0], records[3], records[3]], ORDER)
    expected = stored_targets(store8, records=records[:8])(loaded)
    source = StoredTargets(from_store(store8), records[:8], VIEWS, torch.device("cuda"), residency)
    found = source(loaded)
    assert found.features is not None
    assert expected.features is not None
    assert torch.equal(found.features.cpu(), expected.features)
    assert torch.equal(found.logits.cpu(), expected.logits)  # type: ignore[union-attr,arg-type]
