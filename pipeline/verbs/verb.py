"""What every verb does: a foreseeable mistake ends with a message and an exit code, results are printed alike."""

from __future__ import annotations

import errno
import sys
import traceback
from typing import Any

import click

from data.errors import TeachOnceError


class Verb(click.Command):
    """A command that ends foreseeable mistakes with a message and an exit code; `--debug` adds the traceback."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."))

    def invoke(self, ctx: click.Context) -> None:
        """Run the verb."""
        debug = ctx.params.pop("debug")
        try:
            super().invoke(ctx)
            return
        except Exception as error:
            told = foreseen(error)
            if told is None:
                raise
            if debug:
                traceback.print_exc()
        message, code = told
        click.echo(f"error: {message}", err=True)
        ctx.exit(code)


class TrainingVerb(Verb):
    """A verb with the options of a run's configuration, which are read off its models when they are asked for."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the options, those of the configuration first."""
        if not self._complete:
            from pipeline.train_options import training_options

            self.params[:0] = training_options()
            self._complete = True
        return super().get_params(ctx)

    _complete = False


def foreseen(error: Exception) -> tuple[str, int] | None:
    """Return the message and the exit code of a failure that needs no traceback, None for any other."""
    if isinstance(error, TeachOnceError):
        return str(error), error.exit_code
    # Where the reader of a pipe has gone, click ends quietly.
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        return f"{error.filename or 'input or output'}: {error.strerror or error}", 1
    # torch's own class, which is not imported for this.
    if type(error).__name__ == "OutOfMemoryError":
        return "the device ran out of memory\n  next: lower --batch-size", 1
    return None


def print_rich(*renderables: Any) -> None:
    """Print tables to stdout, at the terminal's width or 80 columns off one."""
    from rich.console import Console

    # No markup: a path may well hold square brackets.
    console = Console(width=None if sys.stdout.isatty() else 80, markup=False)
    for renderable in renderables:
        if isinstance(renderable, str):
            click.echo(renderable)  # unwrapped: paths and commands are there to be copied
        else:
            console.print(renderable)
