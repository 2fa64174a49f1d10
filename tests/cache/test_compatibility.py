"""A store is resumed only with what it was made from; everything else is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cache.plan import StorePlan
from data.errors import StoreStaleError

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

IMAGE_4 = hashlib.sha256(b"image 4").hexdigest()
Change = Callable[["TinyStores"], StorePlan]


def sample_changed(stores: TinyStores, row: int, **changes: Any) -> StorePlan:
    samples = stores.samples(7)
    samples[row] = dataclasses.replace(samples[row], **changes)
    return stores.plan(samples=samples)


def dino_changed(stores: TinyStores, **changes: Any) -> StorePlan:
    return stores.plan(teachers=[stores.teacher("dino", **changes), "clip"])


def dino_identity(stores: TinyStores, **changes: Any) -> StorePlan:
    return dino_changed(stores, identity={**stores.teacher("dino").identity, **changes})


REFUSED: dict[str, tuple[Change, str]] = {
    "fewer images": (
        lambda s: s.plan(5, limit=5),
        "dataset.samples: stored 2007:train: 7 images, VOC2007/000001 … VOC2007/000007,"
        " found 2007:train --limit 5: 5 images, VOC2007/000001 … VOC2007/000005",
    ),
    "more images": (lambda s: s.plan(8), "dataset.samples: stored 2007:train: 7 images"),
    "another order": (
        lambda s: s.plan(samples=[*s.samples(7)[1::-1], *s.samples(7)[2:]]),
        "dataset.samples[0].id: stored VOC2007/000001, found VOC2007/000002",
    ),
    "another image of the same name": (
        lambda s: sample_changed(s, 3, sha256="0" * 64),
        f"dataset.samples[VOC2007/000004].sha256: stored {IMAGE_4}, found {'0' * 64}",
    ),
    "another size": (
        lambda s: sample_changed(s, 0, width=500),
        "dataset.samples[VOC2007/000001].size: stored [301,401], found [301,500]",
    ),
    "another frame": (lambda s: s.plan(frame=(512, 480)), "frame: stored [480,480], found [512,480]"),
    "another spec": (lambda s: dino_identity(s, spec="dinov2_vitb14"), "dino.spec: stored dino, found dinov2_vitb14"),
    "another input size": (
        lambda s: dino_identity(s, input_size=[480, 480]),
        "dino.input_size: stored [420,420], found [480,480]",
    ),
    "a nested field": (
        lambda s: dino_identity(s, normalisation={"mean": [0.5, 0.5, 0.5]}),
        "dino.normalisation.mean: stored [0.485,0.456,0.406], found [0.5,0.5,0.5]",
    ),
    "a field more": (lambda s: dino_identity(s, layer=11), "dino.layer: stored null, found 11"),
    "another dtype": (
        lambda s: s.plan(feature_dtype="float32"),
        "dino.original.arrays.features.dtype: stored float16, found float32",
    ),
    "another grid": (
        lambda s: dino_changed(s, outputs={"features": (2, 3, 5)}),
        "dino.original.arrays.features.sample_shape: stored [3,2,5], found [2,3,5]",
    ),
    "an output more": (
        lambda s: dino_changed(s, outputs={"features": (3, 2, 5), "embeddings": (6,)}),
        'dino.original.arrays.embeddings: stored null, found {"dtype":"float32","sample_shape":[6]}',
    ),
    "another shard length": (
        lambda s: s.plan(shard_samples=64),
        "dino.original.layout.shard_samples: stored 3, found 64",
    ),
    "another batch size": (lambda s: s.plan(batch_size=5), "dino.original.layout.batch_size: stored 16, found 5"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_differs_is_named_with_both_values_and_nothing_is_touched(
    stores: TinyStores,
    store: Path,
    tree_of: Callable[[Path], dict[str, bytes]],
    change: Change,
    message: str,
) -> None:
    before = tree_of(store)
    with pytest.raises(StoreStaleError) as caught:
        stores.build(change(stores), name=store.name)
    assert f"  {message}" in caught.value.message
    assert caught.value.exit_code == 3
    assert "--out" in str(caught.value)
    assert tree_of(store) == before
    assert not [path for path in stores.folder.iterdir() if ".new-" in path.name]


def test_a_new_view_must_have_the_dtype_of_its_siblings(stores: TinyStores) -> None:
    stores.build(stores.plan(views=["original"]))
    with pytest.raises(StoreStaleError, match=r"features\.dtype: stored float16, found float32"):
        stores.build(stores.plan(views=["hflip"], feature_dtype="float32"))


def test_many_differences_are_counted_rather_than_listed(stores: TinyStores) -> None:
    stores.build(stores.plan(teachers=["dino"]))
    other = stores.teacher("dino", identity={f"field_{n:02}": n for n in range(20)})
    with pytest.raises(StoreStaleError, match=r"… and 15 more") as caught:
        stores.build(stores.plan(teachers=[other]))
    assert caught.value.message.count("stored") == 8


def test_names_and_limits_that_choose_the_same_images_are_the_same_store(stores: TinyStores) -> None:
    stores.build(limit=3)
    stores.build(stores.plan(sets=("2007:trainval",), limit=7))


def rotated(probe: np.ndarray[Any, Any], cosine: float) -> np.ndarray[Any, Any]:
    """A vector at exactly that cosine to the probe."""
    across = np.random.default_rng(0).normal(size=probe.shape)
    across -= probe * (across @ probe) / (probe @ probe)
    across *= np.linalg.norm(probe) / np.linalg.norm(across)
    return (cosine * probe + np.sqrt(1 - cosine**2) * across).astype(np.float32)


@pytest.mark.parametrize("cosine", [0.99985, 0.9, 0.0, -1.0])
def test_a_teacher_that_says_something_else_of_the_probe_is_refused(stores: TinyStores, cosine: float) -> None:
    stores.build(limit=1)
    probe = rotated(stores.teacher("dino").probe, cosine)
    with pytest.raises(StoreStaleError, match=rf"dino no longer says .* cosine {cosine:.5f}\d to the stored one"):
        stores.build(dino_changed(stores, probe=probe))


def test_a_teacher_that_says_the_same_but_for_rounding_is_accepted(stores: TinyStores) -> None:
    stores.build(limit=1)
    stores.build(dino_changed(stores, probe=rotated(stores.teacher("dino").probe, 0.99995)))


def test_a_probe_of_another_length_is_refused(stores: TinyStores) -> None:
    stores.build(limit=1)
    with pytest.raises(StoreStaleError, match="no longer says"):
        stores.build(dino_changed(stores, probe=np.ones(3, np.float32)))
