"""TeachOnce's command line: `python cli.py VERB`.

Progress goes to stderr, results to stdout. Exit codes: 0 ok; 1 operational failure; 2 usage; 3 store or checkpoint
missing, incomplete, stale or corrupt; 130 interrupted. Everything heavy is imported inside the verbs, so that `--help`
answers at once.
"""

from __future__ import annotations

import os
import sys

import click

from pipeline.verbs import experiments, images, scores, stores, students


class Verbs(click.Group):
    """The group of verbs, listed in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order they are defined in."""
        return list(self.commands)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Run the teachers once, train students many times.

    Stage 1, extract-teachers, writes what frozen teachers say of Pascal VOC to a store; stage 2, train
    --cached-teachers, trains light detectors against it without loading a teacher again.
    """


for verb in (
    stores.teachers,
    stores.extract_teachers,
    students.train,
    experiments.sweep,
    scores.evaluate_verb,
    scores.report_verb,
    students.export,
    stores.inspect_cache,
    stores.convert_cache,
    stores.relabel_logits,
    experiments.demo,
    students.debug_batch,
    images.make_synthetic_voc,
    images.check_voc,
    images.download_voc,
):
    cli.add_command(verb)


def main() -> int:
    """Run the command line and return the exit code."""
    # Before torch loads OpenMP: threads that wait give their core up soon, so that runs beside each other do not spin
    # against each other (docs/decisions/0007).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        result = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: what was finished is kept; the same command goes on (train: with --resume)", err=True)
        return 130
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
