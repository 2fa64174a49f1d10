import io

import pytest
from rich.console import Console

from data.records import VOC_CLASSES
from evaluation.average_precision import EvaluationResult
from evaluation.table import result_table


def result(value, images=4952, metric="voc"):
    return EvaluationResult(
        images=images,
        metric=metric,
        mAP=value,
        per_iou={f"0.{percent}": value for percent in range(50, 100, 5)},
        per_class={name: {"mAP": value, "AP50": value} for name in VOC_CLASSES},
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
    # Ten thresholds, the mean, and two numbers for each of twenty classes.
    expected = {1.0: "100.0", 0.0512: "5.1", None: "–"}[value]
    assert words.count(expected) == 10 + 1 + 40


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        (result(0.5), "VOC all-point area AP in percent, 4,952 images"),
        (result(0.5, images=1, metric="voc07"), "VOC2007 11-point AP in percent, 1 image\n"),
    ],
)
def test_title_tells_metric_and_number_of_images(evaluation, words):
    title = shown(evaluation).splitlines()[0].rstrip() + "\n"
    assert words in title
