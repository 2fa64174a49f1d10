import hashlib
from pathlib import Path

import numpy as np
import pytest

from data.check import check_voc
from data.errors import DatasetError, UsageError
from data.images import decode_image
from data.records import VOC_CLASSES
from data.scene import BACKGROUND, Scene, SceneObject, render_scene
from data.silhouettes import SILHOUETTES, draw_mask, hue_of
from data.synthetic import make_devkit
from data.voc import list_ids, read_voc


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(0, index, VOC_CLASSES) for index in range(40)]


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shown_box(scene: Scene, thing: SceneObject) -> tuple[int, int, int, int]:
    """The box around the pixels that show an object."""
    rows, columns = np.nonzero(scene.owners == thing.number)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, devkit: Path) -> None:
    again = make_devkit(tmp_path, num_train=12, num_val=6, seed=7)
    assert digests(again) == digests(devkit)


def test_another_seed_gives_other_images(tmp_path: Path, devkit: Path) -> None:
    other = make_devkit(tmp_path, num_train=1, num_val=0, seed=8)
    image = "VOC2007/JPEGImages/000001.jpg"
    assert digests(other)[image] != digests(devkit)[image]


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path: Path, devkit: Path) -> None:
    small, large = digests(make_devkit(tmp_path, num_train=1, num_val=2, seed=7)), digests(devkit)
    for number in (1, 2, 3):
        for path in (f"VOC2007/JPEGImages/{number:06d}.jpg", f"VOC2007/Annotations/{number:06d}.xml"):
            assert small[path] == large[path]


def test_the_lists_are_the_devkits(tmp_path: Path) -> None:
    root = make_devkit(tmp_path, num_train=3, num_val=2, num_test=1, year=2012)
    ids = [f"VOC2012/{number:06d}" for number in range(1, 7)]
    assert list_ids(root, ["2012:train"]) == ids[:3]
    assert list_ids(root, ["2012:val"]) == ids[3:5]
    assert list_ids(root, ["2012:trainval"]) == ids[:5]
    assert list_ids(root, ["2012:test"]) == ids[5:]


def test_a_split_without_images_has_no_list(tmp_path: Path) -> None:
    main = make_devkit(tmp_path, num_train=2, num_val=0) / "VOC2007" / "ImageSets" / "Main"
    assert {path.name for path in main.glob("*.txt") if "_" not in path.name} == {"train.txt", "trainval.txt"}


def test_per_class_lists_say_present_only_difficult_or_absent(devkit: Path) -> None:
    main = devkit / "VOC2007" / "ImageSets" / "Main"
    seen = set()
    for record in read_voc(devkit, ["2007:trainval"]):
        stem = record.id.split("/")[1]
        for label, name in enumerate(VOC_CLASSES, start=1):
            difficult = record.target.difficult[record.target.labels == label]
            flag = -1 if len(difficult) == 0 else int(not difficult.all())
            seen.add(flag)
            assert f"{stem} {flag:2d}\n" in (main / f"{name}_trainval.txt").read_text()
    assert seen >= {-1, 1}


def test_a_synthetic_devkit_passes_the_check(tmp_path: Path) -> None:
    root = make_devkit(tmp_path, num_train=10, num_val=10, num_test=10, num_empty=3)
    report = check_voc(root, ["2007:trainval", "2007:test"])
    assert (report.ok, report.images, report.images_without_objects) == (True, 30, 3)
    assert {problem.level for problem in report.problems} == {"note"}


def test_torchvision_reads_the_same_objects(devkit: Path) -> None:
    from torchvision.datasets import VOCDetection

    theirs = VOCDetection(str(devkit.parent), year="2007", image_set="trainval")
    records = read_voc(devkit, ["2007:trainval"])
    assert len(theirs) == len(records)
    for (image, target), record in zip(theirs, records, strict=True):
        found = target["annotation"]
        assert image.size == record.image_size[::-1]
        assert found["folder"] == "VOC2007"
        assert found["filename"] == record.image_path.name
        assert [VOC_CLASSES.index(thing["name"]) + 1 for thing in found["object"]] == record.target.labels.tolist()
        assert [thing["difficult"] == "1" for thing in found["object"]] == record.target.difficult.tolist()
        corners = [
            [int(thing["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for thing in found["object"]
        ]
        np.testing.assert_array_equal(np.array(corners) - [1, 1, 0, 0], record.target.boxes_xyxy_orig)


def test_every_class_is_seen_and_so_are_difficult_occluded_and_truncated_objects(scenes: list[Scene]) -> None:
    things = [thing for scene in scenes for thing in scene.objects]
    assert {thing.name for thing in things} == set(VOC_CLASSES)
    for attribute in ("difficult", "occluded", "truncated"):
        assert {getattr(thing, attribute) for thing in things} == {True, False}
    assert {scene.image.shape[:2] for scene in scenes} >= {(375, 500), (500, 375), (500, 333), (320, 480)}
    assert {len(scene.objects) for scene in scenes} >= {1, 2, 3, 4}
    assert max(len(scene.objects) for scene in scenes) <= 6


def test_boxes_are_tight_around_what_is_shown_of_uncovered_objects(scenes: list[Scene]) -> None:
    uncovered = [(scene, thing) for scene in scenes for thing in scene.objects if thing.visible == 1]
    assert len(uncovered) > 40
    for scene, thing in uncovered:
        assert shown_box(scene, thing) == thing.box_xyxy


def test_boxes_of_covered_objects_hold_what_is_shown_and_stay_in_the_image(scenes: list[Scene]) -> None:
    covered = [(scene, thing) for scene in scenes for thing in scene.objects if thing.visible < 1]
    assert len(covered) > 10
    for scene, thing in covered:
        (x1, y1, x2, y2), (left, top, right, bottom) = thing.box_xyxy, shown_box(scene, thing)
        height, width = scene.owners.shape
        assert 0 <= x1 <= left < right <= x2 <= width
        assert 0 <= y1 <= top < bottom <= y2 <= height


def test_covering_an_object_leaves_its_box_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # With the later silhouettes drawn as nothing but one corner pixel, the first object lies bare.
    index = next(
        i for i in range(40) if any(t.visible < 1 and t.number == 0 for t in render_scene(0, i, VOC_CLASSES).objects)
    )
    whole = render_scene(0, index, VOC_CLASSES).objects[0]
    drawn = []

    def first_only(name: str, size: tuple[int, int]) -> np.ndarray:
        drawn.append(name)
        mask = draw_mask(name, size)
        return mask if len(drawn) == 1 else mask & (np.cumsum(mask.ravel()).reshape(mask.shape) == 1)

    monkeypatch.setattr("data.scene.draw_mask", first_only)
    bare = render_scene(0, index, VOC_CLASSES)
    rows, columns = np.nonzero(bare.owners == 0)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == whole.box_xyxy


def test_the_ownership_map_is_what_was_painted(scenes: list[Scene]) -> None:
    for index, scene in enumerate(scenes[:10]):
        background = render_scene(0, index, VOC_CLASSES, empty=True)
        changed = (scene.image != background.image).any(axis=2)
        owned = scene.owners != BACKGROUND
        assert not (changed & ~owned).any()
        # Paint may by chance have a background pixel's very colour.
        assert np.count_nonzero(owned & ~changed) < 0.01 * np.count_nonzero(owned)


def test_hardly_visible_objects_are_difficult_and_hidden_ones_left_out(scenes: list[Scene]) -> None:
    things = [thing for scene in scenes for thing in scene.objects]
    assert all(thing.visible >= 0.1 for thing in things)
    assert all(thing.difficult == (thing.visible < 0.4) for thing in things)
    many = [render_scene(1, index, VOC_CLASSES) for index in range(60)]
    left_out = [max(thing.number for thing in scene.objects) + 1 - len(scene.objects) for scene in many]
    assert max(left_out) > 0


def test_truncated_objects_touch_the_border(scenes: list[Scene]) -> None:
    for scene in scenes:
        height, width = scene.owners.shape
        for thing in scene.objects:
            x1, y1, x2, y2 = thing.box_xyxy
            assert not thing.truncated or x1 == 0 or y1 == 0 or x2 == width or y2 == height


def test_objects_have_their_classs_hue_in_the_written_jpeg(devkit: Path) -> None:
    records = read_voc(devkit, ["2007:trainval"])
    checked = 0
    for index, record in enumerate(records):
        scene = render_scene(7, index, VOC_CLASSES)
        hsv = np.asarray(decode_image(record).convert("HSV"))
        for thing in scene.objects:
            pixels = hsv[scene.owners == thing.number]
            angle = np.median((pixels[:, 0] / 255 - hue_of(thing.name) + 0.5) % 1) - 0.5
            assert abs(angle) < 0.04, (record.id, thing.name)
            checked += 1
    assert checked > 20


def test_every_silhouette_is_its_own() -> None:
    masks = {name: draw_mask(name, (64, 64)) for name in VOC_CLASSES}
    assert list(SILHOUETTES) == list(VOC_CLASSES)
    assert len({hue_of(name) for name in VOC_CLASSES}) == len(VOC_CLASSES)
    for first in VOC_CLASSES:
        for second in VOC_CLASSES:
            union = np.count_nonzero(masks[first] | masks[second])
            assert first == second or np.count_nonzero(masks[first] & masks[second]) / union < 0.9


def test_only_the_classes_asked_for_are_drawn(tmp_path: Path) -> None:
    root = make_devkit(tmp_path, num_train=8, num_val=0, classes=("cat", "dog"))
    labels = {int(label) for record in read_voc(root, ["2007:train"]) for label in record.target.labels}
    assert labels == {8, 12}


def test_empty_images_come_first_and_hold_nothing(tmp_path: Path) -> None:
    records = read_voc(make_devkit(tmp_path, num_train=3, num_val=1, num_empty=2), ["2007:trainval"])
    assert [len(record.target) > 0 for record in records] == [False, False, True, True]


@pytest.mark.parametrize("occupant", ["VOC2007/readme.txt", "VOC2007"])
def test_nothing_is_written_over_what_is_there(tmp_path: Path, occupant: str) -> None:
    (tmp_path / occupant).parent.mkdir(exist_ok=True)
    (tmp_path / occupant).write_text("mine")
    with pytest.raises(DatasetError) as caught:
        make_devkit(tmp_path, num_train=1, num_val=0)
    assert caught.value.message == (
        f"{tmp_path / 'VOC2007'}: something is here already; a synthetic devkit is never written over it"
    )
    assert (tmp_path / occupant).read_text() == "mine"


def test_an_empty_folder_is_no_obstacle_and_other_years_stay(tmp_path: Path) -> None:
    (tmp_path / "VOC2007").mkdir()
    (tmp_path / "VOC2012").mkdir()
    make_devkit(tmp_path, num_train=1, num_val=0)
    assert {path.name for path in tmp_path.iterdir()} == {"VOC2007", "VOC2012"}


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert total == 5
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_devkit(tmp_path, num_train=5, num_val=0, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_dataset_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot be written"):
        make_devkit(tmp_path / "file", num_train=1, num_val=0)


BAD_REQUESTS = {
    "no image": ({"num_train": 0}, "expected at least one image and no negative count, found 0 train, 0 val, 0 test"),
    "negative": (
        {"num_train": 3, "num_val": -1},
        "expected at least one image and no negative count, found 3 train, -1 val, 0 test",
    ),
    "too many empty": ({"num_empty": 2}, "expected 0 to 1 images without objects, found 2"),
    "no class": ({"classes": ()}, "found none"),
    "unknown class": ({"classes": ("cat", "yeti")}, "found yeti"),
    "year": ({"year": 7}, "expected a year of four digits, found 7"),
    "seed": ({"seed": -1}, "expected a seed of 0 or more, found -1"),
}


@pytest.mark.parametrize(("options", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_an_impossible_request_is_a_usage_error(tmp_path: Path, options: dict[str, object], message: str) -> None:
    request = {"num_train": 1, "num_val": 0, **options}
    with pytest.raises(UsageError) as caught:
        make_devkit(tmp_path, **request)  # type: ignore[arg-type]
    assert caught.value.message.endswith(message)
    assert list(tmp_path.iterdir()) == []
