"""What a training run says of its steps and epochs while it runs, in lines that fit 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pipeline.objective import KD_PARTS

# What a loss goes by; a baseline's total is that of the detector's four.
_OBJECTIVE = {name: name for name in ("detection", *KD_PARTS)}
_DETECTION = {
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_objectness": "object",
    "loss_rpn_box_reg": "rpn box",
}


def step_note(losses: Mapping[str, Tensor], seconds: Mapping[str, float], processes: int) -> str:
    """Return the share of time spent waiting for data, and a step's losses: the weighted total and its parts.

    losses: this process's share of the step's, scalars by name; without any where it had no image.  seconds: of the
    epoch so far, as `Clock.seconds` gives them.
    """
    waiting = _waiting(seconds)
    if "total" not in losses:
        return waiting
    names = _shown(losses)
    # One copy off the device.
    values = torch.stack([losses[name].float() for name in ("total", *names)]) * processes
    total, *parts = values.tolist()
    return f"{waiting}; loss {total:.3g}: {_listed(dict(zip(names.values(), parts, strict=True)))}"


def epoch_lines(metrics: Mapping[str, Any], epochs: int, images: int) -> str:
    """Return an epoch's mean losses by part; on a second line its speed, the training left, and the validation.

    metrics: a line of `metrics.jsonl`.  images: that were trained on.
    """
    losses, seconds, val = metrics["losses"], metrics["seconds"], metrics["val"]
    shown = _listed({short: losses[name] for name, short in _shown(losses).items()})
    speed = f"{images / max(seconds['training'], 1e-9):.1f} images/s, {_waiting(seconds)}"
    text = f"epoch {metrics['epoch']}/{epochs}: {shown}\n  {speed}"
    left = round((epochs - metrics["epoch"]) * seconds["training"])
    if left > 0:
        text += f", {timedelta(seconds=left)} left"
    if val is not None and val["mAP"] is not None:
        text += f"; val mAP {100 * val['mAP']:.2f}, AP@0.50 {100 * val['per_iou']['0.50']:.2f}"
    return text


def _shown(losses: Mapping[str, Any]) -> dict[str, str]:
    """Return the losses that a line names, and what it calls them."""
    names = _OBJECTIVE if any(name in losses for name in KD_PARTS) else _DETECTION
    return {name: short for name, short in names.items() if name in losses}


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def _waiting(seconds: Mapping[str, float]) -> str:
    return f"waiting {100 * seconds['data_wait'] / max(seconds['training'], 1e-9):.1f} %"
