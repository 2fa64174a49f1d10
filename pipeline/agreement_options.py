"""What `eval --agreement` was asked for. Imports torch only where it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UsageError

if TYPE_CHECKING:
    from pipeline.agreement_run import AgreementRun


def open_agreement(
    checkpoint: Path | None,
    stores: tuple[Path, ...],
    feature_teacher: str | None,
    logit_teacher: str | None,
    options: Mapping[str, Any],
) -> AgreementRun | None:
    """Return what is compared, opened, so that what lacks is told before minutes of scoring; None where nothing is.

    options: of `eval`, by name.

    Raises UsageError for options that do not go together, else as `AgreementRun.open`.
    """
    if not stores:
        if feature_teacher is not None or logit_teacher is not None:
            raise UsageError(
                "--feature-teacher and --logit-teacher name teachers of a store", hint="give it as --agreement STORE"
            )
        return None
    if checkpoint is None:
        raise UsageError("--agreement goes with --checkpoint: detections have no features or logits to compare")
    from pipeline.agreement_run import AgreementRun
    from pipeline.agreement_targets import AgreementRequest

    given = {name: options[name] for name in ("backbone", "voc_root", "voc_sets", "workers", "device")}
    return AgreementRun.open(AgreementRequest(stores, feature_teacher, logit_teacher), checkpoint, **given)
