"""Raw images to what goes into the shards."""

import io

import numpy as np
import pytest
from PIL import Image
from raw_images import encoded, pixels

from resnet_cpu.data.images import BadImage
from resnet_cpu.data.sources.conversion import Options, convert

KEEP = Options(None, 95)


def opened(content):
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize("kind", ["JPEG", "grey", "rotated"])
def test_jpegs_keep_their_bytes(kind):
    content = encoded(kind)
    found = convert(content, KEEP)
    assert (found.encoded, found.change) == (content, "")
    assert (found.height, found.width, found.channels) == (40, 48, 1 if kind == "grey" else 3)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("CMYK", "CMYK to RGB"),
        ("PNG", "PNG to JPEG"),
        ("GIF", "GIF to JPEG"),
        ("BMP", "BMP to JPEG"),
        ("alpha", "PNG to JPEG"),
        ("16 bit", "PNG to JPEG"),
        ("palette", "PNG to JPEG"),
    ],
)
def test_other_images_become_jpegs_that_look_the_same(kind, change):
    found = convert(encoded(kind, seed=3), KEEP)
    assert found.change == change
    image = opened(found.encoded)
    assert (image.format, image.mode) == ("JPEG", "L" if kind == "16 bit" else "RGB")
    original = Image.fromarray(pixels(3)).convert(image.mode)
    difference = np.abs(np.asarray(image, np.float32) - np.asarray(original, np.float32))
    assert difference.mean() < (15 if kind in ("palette", "GIF") else 6)  # few colours, against JPEG's loss


def test_large_images_are_made_smaller_and_small_ones_never_larger():
    found = convert(encoded(height=100, width=150), Options(50, 90))
    assert (found.height, found.width, found.change) == (50, 75, "resized")
    assert opened(found.encoded).size == (75, 50)
    small = encoded(height=40, width=30)
    assert convert(small, Options(50, 90)).encoded == small


def test_the_moments_are_those_of_the_pixels():
    content = encoded(seed=5)
    plain = np.asarray(opened(content)).reshape(-1, 3).astype(float)
    np.testing.assert_allclose(convert(content, KEEP, True).moments, [*plain.mean(0), *(plain**2).mean(0)], rtol=1e-6)
    grey = convert(encoded("grey"), KEEP, True).moments
    assert grey[0] == grey[1] == grey[2] and grey[3] == grey[5]
    assert convert(content, KEEP).moments == ()


def test_truncated_images_are_refused_at_any_length():
    whole = encoded(height=64, width=64, quality=90)
    for length in range(0, len(whole) - 2, 29):
        with pytest.raises(BadImage):
            convert(whole[:length], KEEP)
    with pytest.raises(BadImage, match="damaged PNG"):
        convert(encoded("PNG")[:-40], KEEP)
    assert convert(whole, KEEP).encoded == whole  # negative control
