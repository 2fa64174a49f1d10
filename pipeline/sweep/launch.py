"""Starts a command that ends when its parent does: `launch.py PARENT_PID COMMAND …`. Run as a script, by itself.

A sweep that is killed cannot end its runs any more, and a run that went on alone would still write when the next sweep
resumes it. The kernel sends the signal (prctl(2), PR_SET_PDEATHSIG); it outlives the exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it died before the signal was asked for
        sys.exit(128 + signal.SIGTERM)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
