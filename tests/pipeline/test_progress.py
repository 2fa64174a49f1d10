"""What a person sees of a run: on a terminal of 80 columns, and in a log."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable

import pytest
import torch

import pipeline.progress
from pipeline.progress import Tick, progress
from pipeline.training_lines import epoch_lines, step_note

COLUMNS = 80
SECONDS = {"training": 40.0, "data_wait": 0.12, "targets": 0.0}
DETECTION = {
    "detection": 112.2, "loss_classifier": 101.5, "loss_box_reg": 10.43, "loss_objectness": 0.6871,
    "loss_rpn_box_reg": 0.007451, "gradient_norm": 8.5,
}  # fmt: skip
LOSSES = {"total": 158.3, **DETECTION, "feature": 31.54, "logit": 10.072, "region": 4.5678}


def scalars(values: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> list[str]:
    """Return the lines that a terminal of 80 columns is sent while the work is done, without their colours."""
    leader, follower = os.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    sent: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # Linux says so when the other end was closed
                return
            sent.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w", encoding="utf-8") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        work()
    reader.join()
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(sent).decode())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_a_terminal_of_80_columns_shows_bar_rate_eta_waiting_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    note = step_note(scalars(LOSSES), SECONDS, processes=1)

    def work() -> None:
        with progress("epoch 199/200", 16_551) as tick:
            for _ in range(3):
                tick(4_000, note)

    lines = on_a_terminal(monkeypatch, work)
    assert max(map(len, lines)) <= COLUMNS
    bars = [line for line in lines if line.startswith("epoch")]
    assert re.fullmatch(r"epoch 199/200 [━╸╺ ]{5,} *12000/16551 images [\d.]+/s ETA \d\d:\d\d", bars[-1])
    notes = [line for line in lines if "waiting" in line]
    assert notes[-1] == "  waiting 0.3 %; loss 158: detection 112, feature 31.5, logit 10.1, region 4.57"


def test_work_without_a_note_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with progress("validating", 4_952) as tick:
            tick(2_000)

    lines = on_a_terminal(monkeypatch, work)
    assert {line.split()[0] for line in lines} == {"validating"}
    assert "2000/4952 images" in lines[-1]


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(pipeline.progress.time, "monotonic", lambda: now[0])

    def step(tick: Tick) -> None:
        now[0] += 4
        tick(2, "loss 1")

    with progress("epoch 1/2", 8) as tick:
        for _ in range(4):
            step(tick)
    assert capsys.readouterr().err.splitlines() == [
        "epoch 1/2: 6/8 images, 0.5 images/s, loss 1",
        "epoch 1/2: 8/8 images, 0.5 images/s, loss 1",
    ]


class TestStepNote:
    def test_a_baseline_names_the_detectors_losses(self) -> None:
        note = step_note(scalars({"total": 112.2, **DETECTION}), SECONDS, processes=1)
        assert note == "waiting 0.3 %; loss 112: class 102, box 10.4, object 0.687, rpn box 0.00745"
        assert len(note) + 2 <= COLUMNS

    def test_a_share_stands_for_the_step_of_all_processes(self) -> None:
        note = step_note(scalars({"total": 1.5, "detection": 1.25, "logit": 0.25}), SECONDS, processes=2)
        assert note == "waiting 0.3 %; loss 3: detection 2.5, logit 0.5"

    def test_a_process_without_an_image_has_no_loss_to_tell(self) -> None:
        assert step_note(scalars({"gradient_norm": 1.0}), SECONDS, processes=2) == "waiting 0.3 %"


class TestEpochLines:
    def test_losses_speed_and_validation_fit_80_columns(self) -> None:
        val = {"mAP": 0.1234, "per_iou": {"0.50": 0.3456}}
        lines = epoch_lines({"epoch": 12, "losses": LOSSES, "seconds": SECONDS, "val": val}, 20, 1000).splitlines()
        assert lines == [
            "epoch 12/20: detection 112, feature 31.5, logit 10.1, region 4.57",
            "  25.0 images/s, waiting 0.3 %, 0:05:20 left; val mAP 12.34, AP@0.50 34.56",
        ]

    @pytest.mark.parametrize("val", [None, {"mAP": None}], ids=["not scored", "nothing to find"])
    def test_without_validation_only_the_speed_is_told(self, val: object) -> None:
        told = epoch_lines({"epoch": 1, "losses": DETECTION, "seconds": SECONDS, "val": val}, 1, 1000)
        assert told.splitlines()[1] == "  25.0 images/s, waiting 0.3 %"
