import io

import pytest
from rich.console import Console

from data.records import VOC_CLASSES
from evaluation.average_precision import EvaluationResult
from evaluation.matching import METRICS
from evaluation.sizes import SIZES
from evaluation.table import result_table


def result(value, images=4952, metric="voc"):
    return EvaluationResult(
        images=images,
        metric=metric,
        mAP=value,
        per_iou={f"0.{percent}": value for percent in range(50, 100, 5)},
        per_class={name: {"mAP": value, "AP50": value} for name in VOC_CLASSES},
        definitions={
            name: {"mAP": value, "AP50": value, "per_iou": {f"0.{percent}": value for percent in range(50, 100, 5)}}
            for name in METRICS
        },
        by_size={size: {"mAP": value, "AP50": value, "objects": 7} for size in SIZES},
    )


def shown(evaluation, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(result_table(evaluation))
    return console.file.getvalue()


@pytest.mark.parametrize("value", [1.0, 0.0512, None])
def test_table_is_whole_at_80_columns(value):
    lines = shown(result(value)).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert len(lines) < 24
    words = " ".join(lines).split()
    assert [word for word in words if word in VOC_CLASSES] == [
        name for pair in zip(VOC_CLASSES[:10], VOC_CLASSES[10:], strict=True) for name in pair
    ]
    # Ten thresholds and the mean by three definitions, two numbers for each of twenty classes and three sizes.
    expected = {1.0: "100.0", 0.0512: "5.1", None: "–"}[value]
    assert words.count(expected) == 3 * (10 + 1) + 40 + 6


@pytest.mark.parametrize(
    ("evaluation", "number", "definition"),
    [
        (result(0.5), "mAP in percent, 4,952 images\n", "voc: all-point area, the devkit's matching\n"),
        (result(0.5, 1, "voc07"), "mAP in percent, 1 image\n", "voc07: 11 points, the devkit's matching\n"),
        (result(0.5, metric="coco"), "mAP in percent, 4,952 images\n", "coco: 101 points, COCO's matching\n"),
    ],
)
def test_titles_tell_number_of_images_and_definition(evaluation, number, definition):
    lines = [f"{line.rstrip()}\n" for line in shown(evaluation).splitlines()]
    assert lines[0] == number
    assert definition in lines


def test_a_result_of_one_definition_shows_that_one():
    alone = EvaluationResult(2, "voc", 0.25, {"0.50": 0.25}, {"cat": {"mAP": 0.25, "AP50": 0.25}})
    assert [line.split() for line in shown(alone).splitlines() if line.startswith(" voc ")] == [["voc", "25.0", "25.0"]]
