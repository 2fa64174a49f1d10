import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from data.errors import ImageError
from data.geometry import VIEWS, View
from data.images import Resample, decode_image, image_digest, read_image_bytes, show_view, squash, squash_views
from data.records import ImageRecord
from data.sample import load_sample
from data.voc import read_record, read_voc
from tests.data.tiny_devkit import TinyDevkit


def record_of(tiny: TinyDevkit) -> ImageRecord:
    return read_record(tiny.root, "VOC2007/000001")


def textured(height: int, width: int) -> Image.Image:
    """An image with edges, slopes and noise, in 70..185: bicubic overshoots, which Pillow clips between its passes."""
    rng = np.random.default_rng(0)
    noise = rng.integers(70, 186, (height, width, 3))
    slope = np.linspace(70, 185, width)[None, :, None] * np.ones((height, 1, 3))
    pixels = np.where(np.arange(height)[:, None, None] % 40 < 20, noise, slope)
    return Image.fromarray(pixels.astype(np.uint8))


def test_a_missing_image_is_named(tiny: TinyDevkit) -> None:
    path = tiny.image("000001")
    path.unlink()
    with pytest.raises(ImageError) as caught:
        decode_image(record_of(tiny))
    assert caught.value.message == f"{path}: the image is missing"


def test_an_image_that_cannot_be_read_is_named(tiny: TinyDevkit) -> None:
    path = tiny.image("000001")
    path.unlink()
    path.mkdir()
    with pytest.raises(ImageError) as caught:
        decode_image(record_of(tiny))
    assert caught.value.message == f"{path}: cannot be read (Is a directory)"


def test_an_image_of_another_size_than_annotated_is_refused(tiny: TinyDevkit) -> None:
    tiny.add("000001", size=(80, 100))
    with pytest.raises(ImageError) as caught:
        decode_image(record_of(tiny))
    assert caught.value.message == (f"{tiny.image('000001')}: expected 80×100 as its annotation says, found 100×80")


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_image_is_refused(tiny: TinyDevkit, share: float) -> None:
    path = tiny.image("000001")
    textured(80, 100).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ImageError) as caught:
        decode_image(record_of(tiny))
    assert caught.value.message.startswith(f"{path}: damaged image (")


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"<html></html>"], ids=["empty", "header only", "web page"])
def test_what_is_no_image_is_refused(tiny: TinyDevkit, data: bytes) -> None:
    tiny.image("000001").write_bytes(data)
    with pytest.raises(ImageError) as caught:
        decode_image(record_of(tiny))
    assert caught.value.message == f"{tiny.image('000001')}: neither a JPEG nor a PNG image"


def test_other_formats_never_reach_their_decoders(tiny: TinyDevkit) -> None:
    data = BytesIO()
    Image.new("RGB", (100, 80)).save(data, "TIFF")
    with pytest.raises(ImageError, match="neither a JPEG nor a PNG image"):
        decode_image(record_of(tiny), data.getvalue())


def test_a_forged_header_is_refused_before_its_pixels_are_allocated(tiny: TinyDevkit) -> None:
    data = bytearray(tiny.image("000001").read_bytes())
    frame = data.index(b"\xff\xc0") + 5  # the baseline frame header: height, then width
    data[frame : frame + 4] = (9000).to_bytes(2, "big") * 2
    with pytest.raises(ImageError, match="expected 100×80 as its annotation says, found 9000×9000"):
        decode_image(record_of(tiny), bytes(data))


@pytest.mark.parametrize("mode", ["L", "CMYK", "P"])
def test_every_mode_is_decoded_to_rgb(tiny: TinyDevkit, mode: str) -> None:
    data = BytesIO()
    Image.new("RGB", (100, 80), (204, 204, 204)).convert(mode).save(data, "PNG" if mode == "P" else "JPEG")
    image = decode_image(record_of(tiny), data.getvalue())
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - 204).max() <= 3


def test_bytes_that_were_read_already_are_not_read_again(tiny: TinyDevkit) -> None:
    record = record_of(tiny)
    data = read_image_bytes(record.image_path)
    record.image_path.unlink()
    assert decode_image(record, data).size == (100, 80)


def test_the_digest_is_that_of_the_files_bytes(tiny: TinyDevkit) -> None:
    path = tiny.image("000001")
    assert image_digest(read_image_bytes(path)) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(375, 500), (500, 333), (120, 200), (480, 480)], ids=str)
def test_the_squash_is_torchs_antialiased_interpolation(size: tuple[int, int], resample: Resample) -> None:
    image = textured(*size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(torch.float64)
    theirs = torch.nn.functional.interpolate(pixels, (480, 480), mode=resample, align_corners=False, antialias=True)
    ours = squash(image, resample=resample)
    assert (ours.shape, ours.dtype) == ((480, 480, 3), np.uint8)
    assert np.abs(ours - theirs[0].permute(1, 2, 0).numpy()).max() <= 2


def test_the_hflip_view_is_the_mirrored_original(devkit: Path) -> None:
    record = read_voc(devkit, ["2007:train"])[0]
    original = np.asarray(decode_image(record))
    mirrored = np.asarray(show_view(decode_image(record), "hflip"))
    np.testing.assert_array_equal(mirrored, original[:, ::-1])
    np.testing.assert_array_equal(np.asarray(show_view(decode_image(record), "original")), original)


def bright_box(image: NDArray[np.uint8]) -> list[int]:
    """The box around the pixels nearer to white than to black."""
    bright = image.mean(axis=2) > 127
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("box", [(1, 1, 40, 30), (61, 11, 100, 80), (33, 21, 52, 44)], ids=str)
def test_a_bright_blob_lands_where_its_box_does(tiny: TinyDevkit, box: tuple[int, ...], view: View) -> None:
    xmin, ymin, xmax, ymax = box
    corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    tiny.add("000001", f"<object><name>cat</name><bndbox>{corners}</bndbox></object>")
    pixels = np.zeros((80, 100, 3), dtype=np.uint8)
    pixels[ymin - 1 : ymax, xmin - 1 : xmax] = 255
    Image.fromarray(pixels).save(tiny.image("000001"), quality=95)
    sample = load_sample(record_of(tiny), view)
    np.testing.assert_allclose(sample.boxes_xyxy, [bright_box(sample.image)], atol=1)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    to=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    resample=st.sampled_from(["bilinear", "bicubic"]),
)
def test_views_from_one_resize_are_those_of_a_resize_each(
    size: tuple[int, int], to: tuple[int, int], resample: Resample
) -> None:
    """Mirroring and an antialiased resize commute to the bit, enlarging and shrinking, at odd and even sizes."""
    image = textured(*size)
    shown = squash_views(image, VIEWS, to, resample)
    for view in VIEWS:
        np.testing.assert_array_equal(shown[view], squash(show_view(image, view), to, resample))
