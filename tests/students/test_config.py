import subprocess
import sys

import pytest
from pydantic import ValidationError

from students.config import StudentConfig


def test_config_imports_no_torch() -> None:
    code = "import sys, students.config; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"backbone": "resnet19"}, "expected resnet18, .* or timm:NAME, found 'resnet19'", id="backbone"),
        pytest.param({"backbone": "timm:"}, "found 'timm:'", id="empty timm name"),
        pytest.param({"norms": "off"}, "norms", id="norms"),
        pytest.param({"backbone_weights": ""}, "backbone_weights", id="empty weights"),
        pytest.param({"score_threshold": 1.5}, "score_threshold", id="threshold"),
        pytest.param({"detections_per_image": 0}, "detections_per_image", id="no detections"),
        pytest.param({"pretrained": True}, "pretrained", id="unknown field"),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("weights", "norms", "frozen"),
    [
        ("imagenet", "auto", True),
        ("weights.pth", "auto", True),
        ("none", "auto", False),
        ("imagenet", "trained", False),
        ("none", "frozen", True),
    ],
)
def test_norms_follow_the_weights_unless_told(weights: str, norms: str, frozen: bool) -> None:
    config = StudentConfig.model_validate({"backbone_weights": weights, "norms": norms})
    assert config.freezes_norms is frozen
    assert config.without_weights().freezes_norms is frozen
    assert config.without_weights().backbone_weights == "none"


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        ("mobilenet_v3_small", "mobilenetv3_small_100"),
        ("timm:swin_tiny_patch4_window7_224.ms_in1k", "swin_tiny_patch4_window7_224.ms_in1k"),
    ],
)
def test_names_lead_to_timms(backbone: str, name: str) -> None:
    assert StudentConfig(backbone=backbone).timm_name == name
