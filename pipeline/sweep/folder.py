"""A sweep's folder: the plan as it is run, and where everything of a run lies.

```
sweeps/NAME/
  plan.yaml              the plan in its normal form, with the stores it was begun with
  runs/RUN/              as `train` writes it; a run with a result.json is finished
  checkpoints/RUN/
  logs/RUN.log           what the run said
  claims/RUN.N.json      who works on it, or did
  results.*              what it all came to
```
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import yaml
from pydantic import ValidationError

from cache.canonical import differences
from data.errors import CheckpointError, UsageError
from pipeline.config import TrainConfig
from pipeline.sweep.plan import STORES, Plan, plan_of, read_document
from pipeline.sweep.stores import StoreRecord, refuse_other_stores
from pipeline.sweep.variants import Run

Status = Literal["finished", "started", "open"]


class SweepFolder:
    """The folder of one sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def plan_file(self) -> Path:
        """The plan as it is run."""
        return self.path / "plan.yaml"

    @property
    def claims(self) -> Path:
        """The folder of the claims."""
        return self.path / "claims"

    def log(self, run: Run) -> Path:
        """Return the file that holds what a run said."""
        return self.path / "logs" / f"{run.name}.log"

    def read(self) -> tuple[Plan, list[StoreRecord]]:
        """Return the plan and the stores it was begun with.

        Raises UsageError where there is no sweep in this folder, or its plan was edited.
        """
        if not self.plan_file.exists():
            raise UsageError(
                f"{self.path}: no sweep here (no plan.yaml)", hint="run one: python cli.py sweep PLAN.yaml"
            )
        document = read_document(self.plan_file)
        try:
            stores = [StoreRecord.model_validate(record) for record in document.pop(STORES, [])]
        except (ValidationError, TypeError) as error:
            raise UsageError(f"{self.plan_file}: {STORES}: not as the sweep wrote it ({error})") from error
        return plan_of(str(self.plan_file), document), stores

    def joined(self, plan: Plan, stores: dict[str, StoreRecord]) -> Plan:
        """Return the plan that this folder would have: the given one, with the seeds that are there already.

        Raises UsageError naming the first difference where another plan was begun here: arms, values of a grid and
        seeds may be added, nothing else; StoreStaleError where it was begun with another store.
        """
        if not self.plan_file.exists():
            return plan
        before, records = self.read()
        refuse_other_stores(self.path, records, stores)
        self._refuse_other(before, plan)
        return plan.with_seeds([*before.seeds, *plan.seeds])

    def begin(self, plan: Plan, stores: dict[str, StoreRecord]) -> None:
        """Make the folder, and write the plan.

        Raises as `joined`, where another process has begun another plan here since that looked.
        """
        for name in ("runs", "checkpoints", "logs", "claims"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        document = {**plan.document(), STORES: [json.loads(record.model_dump_json()) for record in stores.values()]}
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
        temporary = self.plan_file.with_name(f".plan.yaml.{uuid4().hex}")
        temporary.write_text(f"# Written by `sweep`; edit the plan it was made of.\n{text}", encoding="utf-8")
        try:
            os.link(temporary, self.plan_file)  # of two plans that are begun at once, one is refused
        except FileExistsError:
            self.joined(plan, stores)
            temporary.replace(self.plan_file)
        except OSError:  # a file system without hard links
            temporary.replace(self.plan_file)
        finally:
            temporary.unlink(missing_ok=True)

    def _refuse_other(self, before: Plan, now: Plan) -> None:
        one, other = _comparable(before), _comparable(now)
        for arm, content in one["arms"].items():
            found = other["arms"].get(arm)
            for option, values in (content.get("grid") or {}).items():
                grid = (found or {}).get("grid") or {}
                if option in grid and all(value in grid[option] for value in values):
                    grid[option] = values
        other["arms"] = {arm: content for arm, content in other["arms"].items() if arm in one["arms"]}
        for field, old, new in differences(one, other, ""):
            raise UsageError(
                f"{self.path} holds the runs of another plan: {field.removeprefix('.')}: there {_said(old)}, now"
                f" {_said(new)}",
                hint="give another --out; arms, grid values and seeds may be added to a plan, nothing else changed",
            )


def status_of(run: Run) -> Status:
    """Return how far a run is. Raises as `result_of`, and UsageError where a run of other settings has its name."""
    if result_of(run) is not None:
        return "finished"
    config = run.config.run_dir / "config.json"
    if config.exists() and _config(config, config.read_bytes()).computed() != run.config.resolved().computed():
        raise UsageError(f"{config}: a run of other settings has this name", hint="move it away, or give another --out")
    started = config.exists() or (run.config.checkpoint_dir / "student_latest.pth").exists()
    return "started" if started else "open"


def result_of(run: Run) -> dict[str, Any] | None:
    """Return a finished run's `result.json`, None of one that is not.

    Raises CheckpointError where it cannot be read, UsageError where it is of a run with other settings.
    """
    path = run.config.run_dir / "result.json"
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        config = _config(path, json.dumps(result["config"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a run's result", hint=f"run it anew: rm {path}") from error
    if config.computed() != run.config.resolved().computed():
        raise UsageError(f"{path}: a run of other settings has this name", hint="move it away, or give another --out")
    return result


def _config(path: Path, content: str | bytes) -> TrainConfig:
    try:
        return TrainConfig.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: cannot be read as a run's configuration") from error


def _comparable(plan: Plan) -> dict[str, Any]:
    """Return what must stay the same, as JSON: not what is only said about it, nor the seeds."""
    document = json.loads(json.dumps(plan.document()))
    arms = {name: {k: v for k, v in arm.items() if k != "about"} for name, arm in document["arms"].items()}
    train = {option: value for option, value in document["train"].items() if option not in _FREE}
    return {"name": document["name"], "train": train, "arms": arms}


# Options that say where and how a run goes, not what it computes.
_FREE = frozenset({"voc-root", "device", "workers", "residency", "cache-images", "checkpoint-steps", "pictures"})


def _said(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
