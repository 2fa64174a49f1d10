"""Runs `cli.main` in this process, as a shell would: arguments in; exit code, stdout and stderr out."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import cli

# A real MobileNetV3-Small with random weights; a step or two.
SHORT_RUN = ("--backbone", "mobilenet_v3_small", "--backbone-weights", "none", "--epochs", "1", "--batch-size", "2",
             "--workers", "0", "--device", "cpu", "--pictures", "0")  # fmt: skip


class Done(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments: str | Path) -> Done:
    """Run one verb. An exception that the command line lets through is a traceback for the user: it comes through."""
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["cli.py", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        code = cli.main()
    return Done(code, out.getvalue(), err.getvalue())
