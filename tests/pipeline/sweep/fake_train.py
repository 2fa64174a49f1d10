"""Stands for `train` where only how runs are handled counts: a process of the standard library alone, over at once.

`fake_train.py SPEC`: SPEC is JSON with the run's folders and configuration, its score, how many seconds it takes, with
which exit code how many of its first tries end, and the file that every start and end is noted in.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def note(spec: dict, what: str) -> None:
    """Append a line; one write to a file opened so is never torn."""
    file = os.open(spec["events"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{what} {spec['name']} {os.getpid()}\n".encode())
    os.close(file)


def main() -> int:
    """Pretend to train."""
    spec = json.loads(sys.argv[1])
    interrupted = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.append(True))
    run_dir, checkpoint = Path(spec["run_dir"]), Path(spec["checkpoint"])
    note(spec, "resume" if spec["resume"] else "start")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(spec["config"]))
    tries = len(list(run_dir.glob("try-*")))
    (run_dir / f"try-{tries}").touch()
    print("told on stdout")
    until = time.monotonic() + spec["seconds"]
    while time.monotonic() < until and not interrupted:
        time.sleep(0.01)
    if interrupted:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.touch()
        note(spec, "saved")
        return 130
    if tries < spec["failures"]:
        print(f"error: the try {tries} failed\n  next: try again", file=sys.stderr)
        return spec["exit_code"]
    config = spec["config"]
    val = {"mAP": spec["score"], "per_iou": {"0.50": spec["score"]}, "per_class": {}}
    result = {
        "run_name": spec["name"],
        "config": config,
        "targets": {"source": "none"},
        "test": None,
        "device": "cpu",
        "images": {"train": 4, "val": 2, "test": 0},
        "epochs": config["recipe"]["epochs"],
        "steps": 1,
        "last": {"epoch": config["recipe"]["epochs"], "val": val},
        "best": {"epoch": 1, "val": val},
        "selected_and_reported_on_the_same_images": True,
        "seconds_by_epoch": [1.0],
        "data_wait_share": 0.0,
        "seconds": {"training": 1.0, "data_wait": 0.0, "targets": 0.0},
    }
    temporary = run_dir / f".result-{os.getpid()}"
    temporary.write_text(json.dumps(result))
    note(spec, "end")
    temporary.replace(run_dir / "result.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
