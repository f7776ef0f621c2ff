"""Headers of encoded images, and the limits that are checked before anything is decoded."""

import io
import struct

import pytest
from PIL import Image
from raw_images import encoded

from resnet_cpu.data import images
from resnet_cpu.data.images import BadImage, Header, read_header


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        ("JPEG", Header("JPEG", 40, 48, 3)),
        ("grey", Header("JPEG", 40, 48, 1)),
        ("CMYK", Header("JPEG", 40, 48, 4)),
        ("rotated", Header("JPEG", 40, 48, 3)),
        ("PNG", Header("PNG", 40, 48, 3)),
        ("alpha", Header("PNG", 40, 48, 4)),
        ("16 bit", Header("PNG", 40, 48, 1)),
        ("GIF", Header("GIF", 40, 48, 3)),
        ("BMP", Header("BMP", 40, 48, 3)),
    ],
)
def test_the_header_says_format_and_size(kind, header):
    assert read_header(encoded(kind)) == header


def test_progressive_jpegs_and_long_comments_are_read():
    whole = encoded(progressive=True)
    comment = b"\xff\xfe" + struct.pack(">H", 60_000) + b"\xff" * 59_998
    assert read_header(whole[:2] + comment + whole[2:]) == Header("JPEG", 40, 48, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty, 0 bytes"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP"),
        (b"II*\0\0\0", "TIFF"),
        (b"text", "it starts with 74 65 78 74"),
        (b"\xff\xd8\xff", "truncated in its header, 3 bytes"),
        (b"\xff\xd8\x00\x00", "no marker at byte 2"),
        (b"\xff\xd8\xff\xda\x00\x02", "image data before its size"),
    ],
)
def test_other_content_is_named(content, reason):
    with pytest.raises(BadImage, match=reason):
        read_header(content)


def test_every_truncation_of_a_header_is_found():
    whole = encoded()
    size_at = whole.index(b"\xff\xc0") + 10
    for length in range(size_at):
        with pytest.raises(BadImage):
            read_header(whole[:length])
    assert read_header(whole[:size_at]) == Header("JPEG", 40, 48, 3)


def with_size(content, width, height):
    """Return a JPEG whose header claims another size."""
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def test_a_decompression_bomb_is_refused_by_its_header():
    buffer = io.BytesIO()
    Image.new("1", (17_000, 2)).save(buffer, "PNG")
    for bomb in (with_size(encoded(), 50_000, 50_000), with_size(encoded(), 9_000, 9_000), buffer.getvalue()):
        with pytest.raises(BadImage, match="above the limit of 16,384 a side and 67 million in all"):
            read_header(bomb)
    assert read_header(with_size(encoded(), 8_192, 8_192)).height == 8_192  # negative control: at the limit
    with pytest.raises(BadImage, match="JPEG of 0 x 40 pixels"):
        read_header(with_size(encoded(), 0, 40))


def test_the_largest_image_of_imagenet_is_far_below_the_limit():
    assert images.MOST_PIXELS / 3 > 5005 * 3647
