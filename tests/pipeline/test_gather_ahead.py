"""The thread that gathers ahead: order, reuse of its buffers, and its end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipeline.gather_ahead
from cache.reader import TeacherStore
from cache.selected_array import SelectedArray
from cache.selection import Selection
from data.errors import StoreCorruptError
from data.geometry import VIEWS
from data.records import ImageRecord
from pipeline.dataset import EpochBatches, SampleKey
from pipeline.gather_ahead import BUFFERS, Buffers, GatherAhead

CPU = torch.device("cpu")


@pytest.fixture
def arrays(store: Path, records: list[ImageRecord]) -> dict[str, SelectedArray]:
    selection = Selection([TeacherStore(store)], [record.id for record in records])
    return selection.arrays("tiny_dino", "features", VIEWS) | selection.arrays("tiny_clip", "logits", VIEWS)


def batches_of(records: list[ImageRecord], epochs: int = 4) -> list[list[SampleKey]]:
    batches = EpochBatches(records, 5, 0.5, 0)
    drawn = []
    for batches.epoch in range(epochs):
        drawn += list(batches)
    return drawn


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "gather-targets"]


def expected(arrays: dict[str, SelectedArray], keys: Sequence[SampleKey]) -> dict[str, np.ndarray[Any, Any]]:
    positions, views = [key.index for key in keys], [key.view for key in keys]
    return {name: array.gather(positions, views) for name, array in arrays.items()}


class TestOrder:
    def test_every_batch_is_what_gathering_it_gives(
        self, arrays: dict[str, SelectedArray], records: list[ImageRecord]
    ) -> None:
        """Twelve batches through four sets of buffers, the third of each epoch a short one."""
        batches = batches_of(records)
        plain = {name: SelectedArray(array.places) for name, array in arrays.items()}
        said = [expected(plain, keys) for keys in batches]
        ahead = GatherAhead(arrays, batches, CPU)
        for keys, wanted in zip(batches, said, strict=True):
            found = ahead.take(keys)
            for name, values in wanted.items():
                np.testing.assert_array_equal(found[name].numpy(), values)
        ahead.close()
        assert threads() == []

    def test_another_batch_than_the_next_one_is_a_mistake(
        self, arrays: dict[str, SelectedArray], records: list[ImageRecord]
    ) -> None:
        batches = batches_of(records)
        ahead = GatherAhead(arrays, batches, CPU)
        with pytest.raises(AssertionError, match="in their order"):
            ahead.take(batches[1])
        ahead.close()


class TestBuffers:
    def test_a_batch_is_left_alone_until_the_next_is_taken(
        self, arrays: dict[str, SelectedArray], records: list[ImageRecord]
    ) -> None:
        batches = batches_of(records)
        ahead = GatherAhead(arrays, batches, CPU)
        used = set()
        for keys in batches:
            found = ahead.take(keys)["features"]
            used.add(found.data_ptr())
            before = found.clone()
            for _ in range(50):  # the thread has filled all others meanwhile, or does so now
                threading.Event().wait(0.0002)
            assert torch.equal(found, before)
        ahead.close()
        assert len(used) <= BUFFERS

    def test_a_buffer_is_filled_only_after_the_event_of_its_copy(
        self, arrays: dict[str, SelectedArray], records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a GPU the copy is still running when `take` returns; here an event stands for it."""
        done: list[str] = []

        class Event:
            def synchronize(self) -> None:
                done.append("waited")

            def record(self, _: Any) -> None:
                done.append("copied")

        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
        buffers = Buffers(
            {name: torch.from_numpy(array.gather([0] * 5, ["original"] * 5)) for name, array in arrays.items()},
            Event(),  # type: ignore[arg-type]
        )
        fill = SelectedArray.gather

        def gather(*given: Any, **named: Any) -> Any:
            done.append("filled")
            return fill(*given, **named)

        monkeypatch.setattr(SelectedArray, "gather", gather)
        keys = batches_of(records)[0]
        buffers.fill(arrays, keys, [key.index for key in keys])
        buffers.on(CPU, len(keys))
        buffers.fill(arrays, keys, [key.index for key in keys])
        assert done == ["waited", "filled", "filled", "copied", "waited", "filled", "filled"]

    def test_no_more_batches_are_gathered_than_there_is_room_for(
        self, arrays: dict[str, SelectedArray], records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gathered = threading.Semaphore(0)
        count = []
        fill = Buffers.fill

        def counted(self: Buffers, *given: Any) -> None:
            fill(self, *given)
            count.append(1)
            gathered.release()

        monkeypatch.setattr(Buffers, "fill", counted)
        batches = batches_of(records)
        ahead = GatherAhead(arrays, batches, CPU)
        ahead.take(batches[0])
        for _ in range(BUFFERS):
            assert gathered.acquire(timeout=30)
        assert not gathered.acquire(timeout=0.05)
        assert len(count) == BUFFERS
        ahead.close()
        assert threads() == []


class TestEnd:
    @pytest.mark.parametrize("taken", [0, 1, 3, 12])
    def test_closing_at_any_moment_ends_the_thread(
        self, arrays: dict[str, SelectedArray], records: list[ImageRecord], taken: int
    ) -> None:
        batches = batches_of(records)
        ahead = GatherAhead(arrays, batches, CPU)
        assert threads() == []  # a loader may still fork its workers
        for keys in batches[:taken]:
            ahead.take(keys)
        ahead.close()
        assert threads() == []

    def test_what_the_thread_meets_is_raised_where_it_is_waited_for(
        self, arrays: dict[str, SelectedArray], records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batches = batches_of(records)
        gather = SelectedArray.gather

        def damaged(self: SelectedArray, positions: list[int], *given: Any, **named: Any) -> Any:
            if positions == [key.index for key in batches[2]]:
                raise StoreCorruptError("sample 3: checksum fails")
            return gather(self, positions, *given, **named)

        monkeypatch.setattr(SelectedArray, "gather", damaged)
        ahead = GatherAhead(arrays, batches, CPU)
        for keys in batches[:2]:
            ahead.take(keys)
        for _ in range(2):
            with pytest.raises(StoreCorruptError, match="sample 3"):
                ahead.take(batches[2])
        ahead.close()
        assert threads() == []

    def test_the_disk_is_asked_some_batches_before(
        self, arrays: dict[str, SelectedArray], records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []
        monkeypatch.setattr(SelectedArray, "prefetch", lambda _, *given: asked.append(given))
        monkeypatch.setattr(pipeline.gather_ahead, "AHEAD", 2)
        batches = batches_of(records)
        only = {"features": arrays["features"]}
        ahead = GatherAhead(only, batches, CPU)
        pairs = [([key.index for key in keys], [key.view for key in keys]) for keys in batches]
        assert asked == pairs[:2]
        for keys in batches:
            ahead.take(keys)
        ahead.close()
        assert asked == pairs


@pytest.mark.gpu
def test_a_gpu_gets_what_the_cpu_gets(arrays: dict[str, SelectedArray], records: list[ImageRecord]) -> None:
    batches = batches_of(records, epochs=20)
    said = [expected(arrays, keys) for keys in batches]
    ahead = GatherAhead(arrays, batches, torch.device("cuda"))
    kept = [{name: values + 0 for name, values in ahead.take(keys).items()} for keys in batches]
    ahead.close()
    for found, wanted in zip(kept, said, strict=True):
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name].cpu().numpy(), values)
