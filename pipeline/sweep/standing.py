"""How a plan stands: which of its runs are finished, what the finished ones decide, and what waits for what."""

from __future__ import annotations

from typing import Any

from pipeline.sweep.choices import Choice, choose
from pipeline.sweep.folder import result_of
from pipeline.sweep.settings import Places
from pipeline.sweep.variants import Member, Run, Variants


class Standing:
    """A plan's runs. `refresh` looks at the folder again.

    runs: those that nothing is left open of, by member and seed.  results: of the finished ones, likewise.
    choices: what `best_of` came to, by member and option.  undecidable: why a member can never be run, by its name.
    """

    def __init__(self, variants: Variants, places: Places) -> None:
        self.variants = variants
        self.places = places
        self.seeds = variants.plan.seeds
        self.runs: dict[str, dict[int, Run]] = {}
        self.results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in variants.members}
        self.choices: dict[str, dict[str, Choice]] = {}
        self.undecidable: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the results that have come since, and decide what they decide.

        Raises CheckpointError or UsageError for a result that cannot be read, or is another run's.
        """
        for stage in self.variants.stages:
            for member in (member for arm in stage for member in self.variants.members_of(arm)):
                self._decide(member)
                for seed, run in self.runs.get(member.name, {}).items():
                    if seed not in self.results[member.name]:
                        result = result_of(run)
                        if result is not None:
                            self.results[member.name][seed] = result

    def all_runs(self) -> list[Run]:
        """Return the runs that can be named by now: stage by stage, in each all arms with a seed before the next.

        A run that several members share is there once.
        """
        ordered: dict[str, Run] = {}
        for stage in self.variants.stages:
            members = [member for arm in stage for member in self.variants.members_of(arm)]
            for run in (self.runs[m.name][seed] for seed in self.seeds for m in members if m.name in self.runs):
                ordered.setdefault(run.name, run)
        return list(ordered.values())

    def is_finished(self, run: Run) -> bool:
        """Return whether the run's result was there when `refresh` last looked."""
        return run.seed in self.results[run.member.name]

    def waiting(self) -> list[Member]:
        """Return the members that wait for other arms' runs."""
        return [member for name, member in self.variants.members.items() if name not in self.runs]

    @property
    def num_runs(self) -> int:
        """All runs of the plan, those that wait too; what two members share counts once."""
        return len(self.all_runs()) + len(self.waiting()) * len(self.seeds)

    @property
    def num_finished(self) -> int:
        """The finished ones."""
        return sum(map(self.is_finished, self.all_runs()))

    def _decide(self, member: Member) -> None:
        if member.name in self.runs:
            return
        values: dict[str, Any] = {}
        for option, arm in member.references.items():
            choice = choose(self.variants.members_of(arm), option, self.results, self.seeds)
            if isinstance(choice, str):
                self.undecidable[member.name] = choice
            if not isinstance(choice, Choice):
                return
            self.choices.setdefault(member.name, {})[option] = choice
            values[option] = choice.value
        runs = {seed: self.variants.run(member, seed, values, self.places) for seed in self.seeds}
        self.runs[member.name] = runs
