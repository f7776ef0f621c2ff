"""Read format, size and channels of an encoded image from its first bytes. Nothing is decoded.

Sizes are checked before anything is decoded: a JPEG of a few kilobytes may claim billions of pixels.
"""

import dataclasses
import struct

MOST_PIXELS_A_SIDE = 16_384
MOST_PIXELS = 2**26  # 67 megapixels, 200 MB once decoded; the largest photograph of ImageNet has 19 (5005x3647)

_PNG = b"\x89PNG\r\n\x1a\n"
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}  # JPEG markers that no length follows: TEM, RST0-7, SOI, EOI
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers; the others between are DHT, JPG and DAC


class BadImage(ValueError):
    """The bytes are not an image that can be used; the message says why, without the name of the file."""


@dataclasses.dataclass(frozen=True)
class Header:
    """The facts in the header of an image."""

    format: str  # JPEG, PNG, GIF or BMP
    height: int  # pixels
    width: int
    channels: int  # as stored: 1 grey, 3 colour, 4 CMYK or with alpha


def read_header(encoded: bytes) -> Header:
    """Return the header of an encoded image; raise BadImage for other content and for images that are too large."""
    try:
        header = _read(encoded)
    except (struct.error, IndexError):
        raise BadImage(f"truncated in its header, {len(encoded)} bytes") from None
    if header.height < 1 or header.width < 1:
        raise BadImage(f"{header.format} of {header.width} x {header.height} pixels")
    if max(header.height, header.width) > MOST_PIXELS_A_SIDE or header.height * header.width > MOST_PIXELS:
        raise BadImage(
            f"{header.format} of {header.width} x {header.height} pixels, above the limit of {MOST_PIXELS_A_SIDE:,} a "
            f"side and {MOST_PIXELS / 1e6:.0f} million in all"
        )
    return header


def _read(encoded: bytes) -> Header:
    if encoded[:2] == b"\xff\xd8":
        return _read_jpeg(encoded)
    if encoded[:8] == _PNG:
        width, height, _, color = struct.unpack_from(">IIBB", encoded, 16)
        return Header("PNG", height, width, {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(color, 0))
    if encoded[:6] in (b"GIF87a", b"GIF89a"):
        width, height = struct.unpack_from("<HH", encoded, 6)
        return Header("GIF", height, width, 3)
    if encoded[:2] == b"BM":
        if struct.unpack_from("<I", encoded, 14)[0] < 40:
            raise BadImage("BMP of a kind from before 1990")
        width, height, _, bits = struct.unpack_from("<iiHH", encoded, 18)
        return Header("BMP", abs(height), width, {32: 4, 8: 1}.get(bits, 3))
    raise BadImage(_what_else(encoded))


def _what_else(encoded: bytes) -> str:
    """Return what the bytes are that are none of the formats."""
    start = encoded[:64].lstrip().lower()
    if not encoded:
        return "empty, 0 bytes"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not an image"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the image itself"
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "WebP, not JPEG, PNG, GIF or BMP"
    if encoded[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF, not JPEG, PNG, GIF or BMP"
    return f"neither JPEG nor PNG, GIF or BMP; it starts with {encoded[:4].hex(' ')}"


def _read_jpeg(encoded: bytes) -> Header:
    position = 2
    while True:
        if encoded[position] != 0xFF:
            raise BadImage(f"damaged JPEG: no marker at byte {position}")
        marker = encoded[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _FRAMES:
            height, width, channels = struct.unpack_from(">HHB", encoded, position + 5)
            return Header("JPEG", height, width, channels)
        elif marker == 0xDA:
            raise BadImage("damaged JPEG: image data before its size")
        elif marker in _WITHOUT_LENGTH:
            position += 2
        else:
            position += 2 + struct.unpack_from(">H", encoded, position + 2)[0]
