"""Plans: what they expand to, how their runs are named, and everything that is refused before anything runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
from data.errors import TeachOnceError, UsageError
from pipeline.run_options import train_config
from pipeline.sweep.children import train_command
from pipeline.sweep.command import prepare
from pipeline.sweep.folder import SweepFolder
from pipeline.sweep.plan import plan_of, read_plan
from pipeline.sweep.settings import Places
from pipeline.sweep.variants import Variants
from tests.pipeline.sweep.fakes import PLAN, REPOSITORY, request, write_plan

PLANS = sorted((REPOSITORY / "plans").glob("*.yaml"))
DISTILLED = {"cached-teachers": True}
PLACES = Places(Path("out"), (Path("a.zarr"),))


def variants(**changes: Any) -> Variants:
    return Variants("plan.yaml", plan_of("plan.yaml", {**PLAN, **changes}))


class TestExpansion:
    def test_the_experiment_plan_is_fourteen_runs_a_seed(self) -> None:
        found = Variants("plan", read_plan(REPOSITORY / "plans" / "voc-ablation.yaml"))
        assert list(found.members) == [
            "resnet18", "mobilenet_v3_small", "vit_tiny",
            "features-beta1", "features-beta5", "features-beta10", "features-beta20",
            "logits-gamma0.5", "logits-gamma1", "logits-gamma2", "logits-gamma5",
            "both-resnet18", "both-mobilenet_v3_small", "both-vit_tiny",
        ]  # fmt: skip
        assert found.stages[1] == ["both-resnet18", "both-mobilenet_v3_small", "both-vit_tiny"]
        assert found.members["both-vit_tiny"].references == {"beta": "features", "gamma": "logits"}

    def test_its_controls_can_be_uncommented(self, tmp_path: Path) -> None:
        lines = (REPOSITORY / "plans" / "voc-ablation.yaml").read_text().splitlines()
        start = next(n for n, line in enumerate(lines) if line.startswith("  # shuffled-targets"))
        path = tmp_path / "plan.yaml"
        path.write_text("\n".join([*lines[:start], *(line.replace("  # ", "  ", 1) for line in lines[start:])]))
        found = Variants("plan", read_plan(path))
        assert [*found.members][-3:] == ["shuffled-targets", "untrained-teachers", "image-labels"]
        assert found.trial(found.members["untrained-teachers"]).distillation.stores == (Path("data/untrained.zarr"),)
        assert found.trial(found.members["shuffled-targets"]).distillation.target_shuffle == 0
        assert found.trial(found.members["image-labels"]).distillation.logit_targets == "labels"

    @pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
    def test_every_shipped_plan_can_be_meant_and_comes_back_from_its_folder(self, path: Path, tmp_path: Path) -> None:
        found = Variants(str(path), read_plan(path))
        folder = SweepFolder(tmp_path)
        folder.begin(found.plan, {})
        again = Variants("again", read_plan(folder.plan_file))
        assert again.plan == found.plan
        assert again.members == found.members

    def test_a_grid_of_two_options_is_every_combination(self) -> None:
        grid = {"beta": [1, 5], "feature-loss": ["mse", "pkd"]}
        found = variants(arms={"both": {**DISTILLED, "grid": grid}})
        assert list(found.members) == [
            "both-beta1-feature_lossmse", "both-beta1-feature_losspkd",
            "both-beta5-feature_lossmse", "both-beta5-feature_losspkd",
        ]  # fmt: skip
        distilled = found.trial(found.members["both-beta5-feature_losspkd"]).distillation
        assert (distilled.beta, distilled.feature_loss) == (5.0, "pkd")

    def test_an_arms_own_options_win_over_trains_and_null_is_the_default(self) -> None:
        found = variants(train={"epochs": 3, "jitter": 0.5}, arms={"a": {"epochs": 4, "jitter": None}, "b": {}})
        assert found.trial(found.members["a"]).recipe.epochs == 4
        assert found.trial(found.members["a"]).recipe.jitter == 0.0
        assert found.trial(found.members["b"]).recipe.jitter == 0.5

    def test_a_set_option_wins_over_both(self) -> None:
        plan = plan_of("p", {**PLAN, "train": {"epochs": 3}, "arms": {"a": {"epochs": 4}, "b": {"flip": 0}}})
        found = Variants("p", plan, {"epochs": 1})
        assert {found.trial(member).recipe.epochs for member in found.members.values()} == {1}


class TestRuns:
    def test_the_command_of_a_run_means_its_configuration(self) -> None:
        grid = {"feature-loss": ["mgd", "cwd"]}
        options = {"voc-set": ["2007:train", "2012:train"], "amp": "bfloat16", "channels-last": True, "ema": 0.99,
                   "evaluate": "final-only", "learning-rate": 1e-5, "norms": "trained", "limit": 7}  # fmt: skip
        found = variants(train=options, arms={"a": {**DISTILLED, "grid": grid, "target-shuffle": 3}})
        places = Places(
            Path("out folder"), (Path("one.zarr"), Path("two.zarr")), {"one.zarr": "a" * 64, "two.zarr": "b" * 64}
        )
        for member in found.members.values():
            run = found.run(member, 5, {}, places)
            words = shlex.split(train_command(found.options, places, run, resume=False))
            assert words[:3] == ["python", "cli.py", "train"]
            params = cli.cli.commands["train"].make_context("train", words[3:]).params
            for name in ("resume", "as_json", "debug"):
                params.pop(name)
            assert train_config(params) == run.config
            assert run.config.distillation.expect_fingerprints == ("a" * 64, "b" * 64)

    def test_a_runs_name_says_what_it_computes_not_where(self) -> None:
        def name(places: Places = PLACES, seed: int = 1, **train: Any) -> str:
            found = variants(train=train, arms={"a": DISTILLED})
            return found.run(found.members["a"], seed, {}, places).name

        plain = name()
        assert plain.startswith("a-s1-")
        assert name(Places(Path("elsewhere"), (Path("moved.zarr"),), {"moved.zarr": "c" * 64})) == plain
        assert name(device="cuda:1", workers=3, residency="ram") == plain
        changed = [name(**{k: v}) for k, v in (("epochs", 3), ("flip", 0), ("beta", 2))]
        assert len({plain, *changed}) == 4
        # A default that is written out is no other run.
        assert name(epochs=20) == plain

    def test_arms_that_come_to_the_same_share_their_runs(self) -> None:
        found = variants()
        plain, same, other = (found.members[n] for n in ("plain", "rates-learning_rate0.01", "rates-learning_rate0.02"))
        places = Places(Path("out"))
        assert [found.owner(member) for member in (plain, same, other)] == ["plain", "plain", other.name]
        assert found.run(same, 2, {}, places).name == found.run(plain, 2, {}, places).name
        assert found.run(other, 2, {}, places).name != found.run(plain, 2, {}, places).name
        # What is chosen is shared too, once it is known.
        best = variants(arms={**PLAN["arms"], "best": {"learning-rate": {"best_of": "rates"}}})
        run = best.run(best.members["best"], 0, {"learning_rate": 0.02}, places)
        assert run.name == best.run(best.members[other.name], 0, {}, places).name
        # Two stores are two teachers, whatever else is the same.
        two = variants(arms={"a": DISTILLED, "b": {"cached-teachers": "untrained.zarr"}})
        assert [two.owner(member) for member in two.members.values()] == ["a", "b"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        {"arm": {}},
        "seeds, arms\n  next: did you mean arms?",
    ),
    "no name": ({"name": ""}, "plan.yaml: name: String should match pattern"),
    "no arms": ({"arms": {}}, "plan.yaml: arms: "),
    "arm name": ({"arms": {"a/b": {}}}, "arm 'a/b': expected letters, digits"),
    "seed twice": ({"seeds": [1, 1]}, "plan.yaml: seeds: expected seeds from 0, each once"),
    "no seeds": ({"seeds": []}, "plan.yaml: seeds: expected seeds from 0, each once"),
    "train unknown": ({"train": {"epoch": 3}}, "plan.yaml: train: no option epoch\n  next: did you mean epochs?"),
    "train type": ({"train": {"epochs": "banana"}}, "plan.yaml: train: epochs: 'banana' is not a valid int"),
    "train half": ({"train": {"epochs": 2.5}}, "plan.yaml: train: epochs: '2.5' is not a valid int"),
    "train bool": ({"train": {"epochs": True}}, "plan.yaml: train: epochs: expected integer, found true"),
    "train range": (
        {"train": {"epochs": 0}},
        "arm plain: epochs: Input should be greater",
    ),
    "train best_of": (
        {"train": {"epochs": {"best_of": "a"}}},
        "train: epochs: expected one value",
    ),
    "seed option": ({"train": {"seed": 3}}, "plan.yaml: train: seed: a plan has seeds"),
    "live": ({"arms": {"a": {"distill": True}}}, "arm a: distill: a sweep loads no teacher"),
    "run name": ({"arms": {"a": {"run-name": "x"}}}, "arm a: run-name: the sweep names runs"),
    "arm unknown": ({"arms": {"a": {"gird": {"beta": [1]}}}}, "arm a: no option gird\n  next: did you mean grid?"),
    "arm type": ({"arms": {"a": {"batch-size": "many"}}}, "plan.yaml: arm a: batch-size: 'many' is not a valid int"),
    "arm choice": ({"arms": {"a": {"feature-loss": "mae", **DISTILLED}}}, "arm a: feature-loss: 'mae' is not one of"),
    "backbone": ({"arms": {"a": {"backbone": "resnet19"}}}, "arm a: backbone: expected resnet18, mobilenet_v3_small"),
    "twice": ({"arms": {"a": {"voc-set": "2007:val", "voc_sets": "2007:train"}}}, "arm a: voc-set is given twice"),
    "grid scalar": (
        {"arms": {"a": {"grid": {"beta": 3}}}},
        "beta: expected a list of values, as [1, 5, 10], found 3",
    ),
    "grid empty": ({"arms": {"a": {"grid": {"beta": []}}}}, "grid: beta: expected a list of values"),
    "grid unknown": ({"arms": {"a": {"grid": {"bet": [1]}}}}, "arm a: grid: no option bet\n  next: did you mean beta?"),
    "grid type": ({"arms": {"a": {"grid": {"beta": [1, "x"]}}}}, "arm a: grid: beta: 'x' is not a valid float"),
    "grid same": ({"arms": {"a": {**DISTILLED, "grid": {"beta": [1, 1.0]}}}}, "arm a: grid: beta holds a value twice"),
    "grid and value": (
        {"arms": {"a": {**DISTILLED, "beta": 1, "grid": {"beta": [2]}}}},
        "beta has a value and a grid",
    ),
    "grid range": ({"arms": {"a": {**DISTILLED, "grid": {"beta": [1, -1]}}}}, "arm a: beta: Input should be greater"),
    "no targets": (
        {"arms": {"a": {"beta": 5}}},
        "but no teacher's targets\n  next: add cached-teachers: true",
    ),
    "baseline": (
        {"arms": {"a": {"baseline": "plian"}, "plain": {}}},
        "arm a: baseline: no arm 'plian' in this plan",
    ),
    "baseline self": ({"arms": {"a": {"baseline": "a"}}}, "arm a: baseline: an arm cannot be compared with itself"),
    "baseline grid": (
        {"arms": {"a": {"baseline": "b"}, "b": {"grid": {"jitter": [0, 0.5]}}}},
        "arm a: baseline: b has a grid, so it is several",
    ),
    "best_of nobody": (
        {"arms": {"a": {"jitter": {"best_of": "x"}}}},
        "best_of: no arm 'x' in this plan\n  next: the plan's arms: a",
    ),
    "best_of other": (
        {"arms": {"a": {"jitter": {"best_of": "b"}}, "b": {"grid": {"flip": [0, 0.5]}}}},
        "arm a: jitter: best_of: b does not vary jitter (but flip)",
    ),
    "best_of plain": (
        {"arms": {"a": {"jitter": {"best_of": "b"}}, "b": {}}},
        "arm a: jitter: best_of: b does not vary jitter (but nothing)",
    ),
    "best_of word": ({"arms": {"a": {"jitter": {"best_of": "b", "of": 1}}}}, "plan.yaml: arms.a"),
    "mapping": ({"arms": {"a": {"jitter": {"best": "b"}}}}, "arm a: jitter: expected one value, found"),
    "cycle": (
        {
            "arms": {
                "a": {"jitter": {"best_of": "b"}, "grid": {"flip": [0, 0.5]}},
                "b": {"flip": {"best_of": "a"}, "grid": {"jitter": [0, 0.5]}},
            }
        },
        "plan.yaml: arms wait for each other: ",
    ),
    "itself": (
        {"arms": {"a": {"jitter": {"best_of": "a"}, "grid": {"flip": [0, 1]}}}},
        "a does not vary jitter",
    ),
    "same name": (
        {"arms": {"a-jitter0": {"flip": 0}, "a": {"grid": {"jitter": [0, 0.5]}}}},
        "plan.yaml: two arms come to the same name",
    ),
}


class TestBadPlans:
    @pytest.mark.parametrize(("changes", "said"), BAD.values(), ids=BAD)
    def test_what_cannot_be_meant_is_refused_by_place_and_key(self, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(UsageError) as caught:
            variants(**changes)
        assert said in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("name: [", "no YAML"),
            ("- a\n- b", "expected a plan (name, train, seeds, arms), found list"),
            ("", "expected a plan (name, train, seeds, arms), found NoneType"),
            ("name: x\narms:\n  a: {}\n  a: {flip: 0}\n", "the key a stands there twice"),
            ("arms: {a: {}}", "name: missing"),
            ("name: x", "arms: missing"),
            ("name: !!python/object/apply:os.system [ls]\narms: {a: {}}", "no YAML"),
        ],
        ids=["broken", "list", "empty", "twice", "no-name", "no-arms", "code"],
    )
    def test_a_file_that_is_no_plan_is_refused(self, text: str, said: str, tmp_path: Path) -> None:
        path = tmp_path / "p.yaml"
        path.write_text(text)
        with pytest.raises(UsageError) as caught:
            read_plan(path)
        assert f"{path}: " in str(caught.value)
        assert said in str(caught.value)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"none.yaml: cannot be read \(No such file"):
            read_plan(tmp_path / "none.yaml")

    def test_what_an_arm_varies_cannot_be_set(self) -> None:
        for option in ("learning_rate",):
            with pytest.raises(UsageError, match="arm rates: learning-rate is what this arm varies"):
                Variants("p", plan_of("p", PLAN), {option: 0.5})

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"overrides": ("epochs",)}, "--set: expected OPTION=VALUE, found 'epochs'"),
            ({"overrides": ("epochs=x",)}, "--set: epochs: 'x' is not a valid int"),
            ({"overrides": ("epoch=1",)}, "--set: no option epoch\n  next: did you mean epochs?"),
            ({"overrides": ("cached-teachers=a.zarr",)}, "next: give --cached-teachers STORE"),
            ({"overrides": ("voc-set=2009:train",)}, "arm plain: "),
        ],
        ids=["no-value", "type", "unknown", "store", "no-such-set"],
    )
    def test_what_cannot_be_set_is_refused(
        self, changes: dict[str, Any], said: str, devkit: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(TeachOnceError) as caught:
            prepare(request(tmp_path, devkit, **changes))
        assert said in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_an_arm_that_distils_needs_a_store(self, devkit: Path, tmp_path: Path) -> None:
        plan = write_plan(tmp_path, arms={"a": DISTILLED})
        with pytest.raises(UsageError, match="arm a distils from a store, and none was given"):
            prepare(request(tmp_path, devkit, plan=plan))
        with pytest.raises(TeachOnceError, match="does not exist") as caught:
            prepare(request(tmp_path, devkit, plan=plan, cached_teachers=(tmp_path / "none.zarr",)))
        assert caught.value.exit_code == 3


class TestFolders:
    def begun(self, devkit: Path, folder: Path, **changes: Any) -> None:
        prepare(request(folder, devkit, plan=write_plan(folder, **changes))).begin()

    def test_another_plan_on_the_same_folder_is_refused_by_its_first_difference(
        self, devkit: Path, tmp_path: Path
    ) -> None:
        self.begun(devkit, tmp_path)
        arms = {**PLAN["arms"], "rates": {"baseline": "plain", "grid": {"learning-rate": [0.01, 0.02]}}}
        for changes, said in (
            ({"train": {"backbone-weights": "none", "epochs": 3}}, "train.epochs: there nothing, now 3"),
            ({"name": "other"}, 'name: there "rates", now "other"'),
            ({"arms": arms}, "arms.rates.grid.learning-rate: there [0.01, 0.02, 0.04], now [0.01, 0.02]"),
            ({"arms": {"plain": PLAN["arms"]["plain"]}}, "arms.best: there {"),
        ):
            with pytest.raises(UsageError, match="holds the runs of another plan") as caught:
                self.begun(devkit, tmp_path, **changes)
            assert said in str(caught.value)

    def test_arms_grid_values_seeds_and_words_may_be_added(self, devkit: Path, tmp_path: Path) -> None:
        self.begun(devkit, tmp_path)
        rates = {**PLAN["arms"]["rates"], "grid": {"learning-rate": [0.005, 0.01, 0.02, 0.04]}}
        arms = {**PLAN["arms"], "rates": rates, "more": {"jitter": 0.5}}
        self.begun(devkit, tmp_path, arms=arms, seeds=[2, 3], about="more of it")
        plan, _ = SweepFolder(tmp_path / "out").read()
        assert plan.seeds == (0, 1, 2, 3)
        assert list(plan.arms) == ["plain", "rates", "best", "more"]

    def test_a_run_of_other_settings_under_a_runs_name_is_refused(self, devkit: Path, tmp_path: Path) -> None:
        standing = prepare(request(tmp_path, devkit)).standing
        run, other = standing.all_runs()[:2]
        run.config.run_dir.mkdir(parents=True)
        (run.config.run_dir / "config.json").write_text(other.config.resolved().model_dump_json())
        with pytest.raises(UsageError, match="a run of other settings has this name"):
            prepare(request(tmp_path, devkit))

    def test_the_folders_plan_is_a_plan(self, devkit: Path, tmp_path: Path) -> None:
        self.begun(devkit, tmp_path)
        again = prepare(request(tmp_path, devkit, plan=tmp_path / "out" / "plan.yaml"))
        assert again.standing.num_runs == 12
        document = yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())
        assert document["stores"] == []
