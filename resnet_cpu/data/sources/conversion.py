"""Raw image files to what goes into the shards: JPEG, grey or RGB. Decodes by Pillow, whole, so that none is damaged.

JPEGs are kept byte by byte, unless they are CMYK or are to be made smaller. A grey image stays grey and becomes RGB
when it is read. The orientation of EXIF is ignored, as TensorFlow's and PyTorch's readers do.
"""

import dataclasses
import io
import warnings
from typing import Optional, Tuple

import numpy as np
from PIL import Image

from resnet_cpu.data.images import BadImage, read_header

AS_THEY_ARE = ("L", "RGB")  # Pillow's names of grey and RGB


@dataclasses.dataclass(frozen=True)
class Options:
    """Changes that are made to all images."""

    short_side: Optional[int]  # pixels; larger images are made this small. None: sizes stay
    jpeg_quality: int  # of images that are encoded again


@dataclasses.dataclass(frozen=True)
class Converted:
    """An image as it goes into the shards."""

    encoded: bytes  # JPEG
    height: int
    width: int
    channels: int
    change: str  # what was converted, for counting: "", "CMYK to RGB", "PNG to JPEG", "resized", ...
    moments: Tuple[float, ...]  # means of R, G, B and of their squares, of pixels 0..255; empty if not asked for


def convert(encoded: bytes, options: Options, measure: bool = False) -> Converted:
    """Return the image as JPEG, and the moments of its pixels to `measure` them.

    Raises BadImage if the image cannot be decoded to its end or is too large.
    """
    header = read_header(encoded)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # EXIF data that Pillow finds odd
            read = Image.open(io.BytesIO(encoded), formats=[header.format])
            read.load()
            image = _grey_or_rgb(read)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(f"damaged {header.format}: {error}") from None
    changes = []
    if header.format != "JPEG":
        changes.append(f"{header.format} to JPEG")
    elif read.mode not in AS_THEY_ARE:
        changes.append(f"{read.mode} to RGB")
    short = min(image.size)
    if options.short_side and short > options.short_side:
        width, height = (max(round(side * options.short_side / short), options.short_side) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        changes.append("resized")
    if changes:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=options.jpeg_quality)
        encoded = buffer.getvalue()
    moments = _moments(image) if measure else ()
    return Converted(encoded, image.height, image.width, len(image.getbands()), ", ".join(changes), moments)


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode in AS_THEY_ARE:
        return image
    if image.mode.startswith("I"):  # 16 bits of grey
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("1", "LA"):
        return image.convert("L")
    return image.convert("RGB")


def _moments(image: Image.Image) -> Tuple[float, ...]:
    pixels = np.asarray(image).reshape(image.width * image.height, -1).astype(np.float32)
    moments = [*pixels.mean(0, np.float64), *np.square(pixels).mean(0, np.float64)]
    return tuple(float(moment) for moment in moments) if len(moments) == 6 else (*[moments[0]] * 3, *[moments[1]] * 3)
