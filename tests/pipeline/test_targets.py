from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UsageError
from data.geometry import View
from data.records import ImageRecord
from pipeline.config import Distillation
from pipeline.targets import LiveTargets
from pipeline.teacher_choice import choose_teachers, views_drawn
from pipeline.teachers import TeacherChoices, build_teachers
from tests.pipeline.small_runs import TINY_TEACHERS, load, stored_targets

CPU = torch.device("cpu")
BOTH: tuple[View, ...] = ("original", "hflip")
ORDER: list[View] = ["hflip", "original", "original", "hflip"]


def live_targets(records: list[ImageRecord], **weights: Any) -> LiveTargets:
    teachers = build_teachers(TINY_TEACHERS, TeacherChoices(), CPU)
    return LiveTargets(teachers, Distillation(source="live", teachers=TINY_TEACHERS, **weights), records, CPU)


class TestLive:
    def test_live_targets_are_the_stored_ones_before_rounding(self, store32: Path, records: list[ImageRecord]) -> None:
        live = live_targets(records)
        loaded = load(records[:4], ORDER, jitter_strength=0.3, teacher_inputs=live.teacher_inputs)
        said, stored = live(loaded), stored_targets(store32, records=records)(loaded)
        assert said.features is not None
        assert stored.features is not None
        torch.testing.assert_close(said.features, stored.features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(said.logits, stored.logits, rtol=1e-5, atol=1e-4)

    def test_statistics_are_the_stores(self, store32: Path, records: list[ImageRecord]) -> None:
        live, stored = live_targets(records).statistics(), stored_targets(store32, records=records).statistics()
        torch.testing.assert_close(live.mean, stored.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(live.std, stored.std, rtol=1e-4, atol=1e-5)

    def test_the_record_says_that_they_are_untrained(self, records: list[ImageRecord]) -> None:
        record = live_targets(records, gamma=0).record()
        assert record["teachers"] == {"features": "tiny_dino", "logits": None}
        assert record["untrained"] == ["tiny_dino"]


OUTPUTS = {"dino": {"features"}, "clip": {"logits", "embeddings"}, "both": {"features", "logits"}}


class TestChoice:
    def choose(self, keys: tuple[str, ...], **settings: Any) -> tuple[str | None, str | None]:
        chosen = choose_teachers(Distillation(**settings), {key: OUTPUTS[key] for key in keys}, "the store s.zarr")
        return chosen.features, chosen.logits

    @pytest.mark.parametrize(
        ("keys", "settings", "expected"),
        [
            (("dino", "clip"), {}, ("dino", "clip")),
            (("both",), {}, ("both", "both")),
            (("dino",), {"gamma": 0}, ("dino", None)),
            (("clip",), {"beta": 0}, (None, "clip")),
            (("dino", "clip", "both"), {"feature_teacher": "both", "logit_teacher": "clip"}, ("both", "clip")),
            (("dino", "clip", "both"), {"beta": 0, "gamma": 0}, (None, None)),
        ],
        ids=str,
    )
    def test_the_only_or_the_named_one_is_taken(
        self, keys: tuple[str, ...], settings: dict[str, Any], expected: tuple[str | None, str | None]
    ) -> None:
        assert self.choose(keys, **settings) == expected

    @pytest.mark.parametrize(
        ("keys", "settings", "message"),
        [
            (("dino", "both", "clip"), {}, "have features: dino, both\n  next: choose: --feature-teacher NAME"),
            (("dino", "both", "clip"), {"beta": 0}, "have logits: both, clip\n  next: choose: --logit-teacher NAME"),
            (("clip",), {}, "no teacher in the store s.zarr has features.*clip.*\n.*--beta 0"),
            (("dino",), {}, "no teacher in the store s.zarr has logits.*dino.*\n.*--gamma 0"),
            (("dino", "clip"), {"feature_teacher": "clip"}, "--feature-teacher clip: .*teachers with features: dino"),
            (("dino", "clip"), {"logit_teacher": "nope"}, "--logit-teacher nope: .*teachers with logits: clip"),
        ],
        ids=str,
    )
    def test_an_open_choice_is_refused_with_the_candidates(
        self, keys: tuple[str, ...], settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            self.choose(keys, **settings)
        assert caught.value.exit_code == 2

    def test_both_views_are_drawn_as_soon_as_anything_is_flipped(self) -> None:
        assert views_drawn(0.0) == ("original",)
        assert views_drawn(0.1) == views_drawn(1.0) == BOTH
