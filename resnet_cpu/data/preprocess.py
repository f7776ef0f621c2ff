"""From the bytes of one JPEG to the pixels that the network sees; pure TensorFlow, one example at a time.

Crops are decoded, not cut out afterwards: only the blocks under the window go through the inverse cosine transform.
"""

import dataclasses
from typing import Any, Optional, Tuple

import numpy as np
import tensorflow as tf

CROP_ATTEMPTS = 10
DRAWS = 5 * CROP_ATTEMPTS + 1  # (area, aspect, y, x, swap) of each attempt, and the flip
_GRID = 0.001  # on which the authors' Caffe draws area and aspect

# Mean and scale of pixels 0..255; the first is the authors' (sara-nl/caffe train_val.prototxt: BGR order, x 1/128).
_FLAVOURS = {
    "authors": ((104.0, 117.0, 123.0), (128.0,) * 3, True),
    "torch": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False),
    "tf": ((127.5,) * 3, (127.5,) * 3, False),
}


@dataclasses.dataclass(frozen=True)
class View:
    """How an image is looked at: size, interpolation, normalisation; the same in training and evaluation."""

    image_size: int  # pixels
    resize: str  # bilinear or bicubic
    eval_crop: float  # share of the short side
    mean: Tuple[float, ...]  # of pixels 0..255, in the channel order of the network
    scale: Tuple[float, ...]
    bgr: bool
    crop: str = "inception"  # or authors
    crop_area: Tuple[float, float] = (0.08, 1.0)  # share of the image
    crop_aspect: Tuple[float, float] = (3 / 4, 4 / 3)  # inception: of width to height; authors: its root
    jpeg: bool = True  # else any format that TensorFlow decodes, at the cost of decoding all of it


def make_view(
    image_size: int,
    resize: str,
    eval_crop: float,
    normalization: str,
    pixel_mean: Optional[Tuple[float, ...]],
    pixel_std: Optional[Tuple[float, ...]],
    *,
    otherwise: str = "tf",
    **rest: Any,
) -> View:
    """Return the View for a normalisation by name; `rest` are fields of View.

    `auto` is `dataset`, the data set's own mean and deviation, or `otherwise` where nobody has measured them.
    """
    if normalization == "auto":
        normalization = otherwise if pixel_mean is None else "dataset"
    if normalization == "dataset":
        assert pixel_mean is not None and pixel_std is not None  # `training.job` refuses it early
        flavour = pixel_mean, pixel_std, False
    else:
        flavour = _FLAVOURS[normalization]
    return View(image_size, resize, eval_crop, *flavour, **rest)


def training_image(encoded: tf.Tensor, draws: tf.Tensor, augment: str, view: View) -> tf.Tensor:
    """Return float32 [size, size, 3] of a JPEG, augmented by `draws`, float32 [DRAWS] uniform in [0, 1).

    full: a window of random area and aspect, flipped half of the time. light: a window of the evaluation's size at a
    random place, flipped; where evaluation looks at the whole image, it is padded by an eighth first. none: as in
    evaluation.
    """
    if augment == "none":
        return evaluation_image(encoded, view)
    source = _Source(encoded, view)
    shape = source.shape
    if augment == "full":
        window = _area_window(shape, draws, view)
    elif view.eval_crop < 1:
        window = _light_window(shape, draws, view.eval_crop)
    else:
        window = tf.concat([[0, 0], shape[:2]], 0)
    image = source.window(window)
    if augment == "light" and view.eval_crop >= 1:
        image = _shift(image, draws, view)
    image = normalize(image, view)
    return tf.cond(draws[-1] < 0.5, lambda: tf.reverse(image, [1]), lambda: image)


def evaluation_image(encoded: tf.Tensor, view: View) -> tf.Tensor:
    """Return float32 [size, size, 3]: the centre square of `eval_crop` of the short side."""
    source = _Source(encoded, view)
    shape = source.shape[:2]
    if view.eval_crop < 1:
        side = tf.cast(tf.round(tf.cast(tf.reduce_min(shape), tf.float32) * view.eval_crop), tf.int32)
        sides = tf.stack([side, side])
    else:
        sides = tf.fill([2], tf.reduce_min(shape))
    return normalize(source.window(tf.concat([(shape - sides) // 2, sides], 0)), view)


def _area_window(shape: tf.Tensor, draws: tf.Tensor, view: View) -> tf.Tensor:
    """Return int32 [y, x, height, width] of the first attempt that fits, else of the fallback.

    inception: area uniform, aspect log-uniform; falls back to the largest centre window of an allowed aspect (Szegedy
    et al., arXiv 1409.4842, as PyTorch and TensorFlow's examples have it). authors: area A and a number c uniform on a
    grid, height sqrt(A)*c, width sqrt(A)/c, swapped half of the time, so that the aspect is the square of c and wider
    (9/16 ... 16/9 for c in 3/4 ... 4/3); falls back to a square of the short side at a random place
    (`random_aspect_ratio_param` of the authors' Caffe, data_transformer.cpp).
    """
    height, width = tf.cast(shape[0], tf.float32), tf.cast(shape[1], tf.float32)
    attempts = tf.reshape(draws[:-1], [CROP_ATTEMPTS, 5])
    if view.crop == "authors":
        area = height * width * _on_grid(attempts[:, 0], view.crop_area)
        root = _on_grid(attempts[:, 1], view.crop_aspect)
        root = tf.where(attempts[:, 4] < 0.5, 1 / root, root)
        heights, widths = tf.round(tf.sqrt(area) * root), tf.round(tf.sqrt(area) / root)
        side = tf.minimum(height, width)
        fallback = [
            tf.floor(attempts[-1, 2] * (height - side + 1)),
            tf.floor(attempts[-1, 3] * (width - side + 1)),
            side,
            side,
        ]
    else:
        (least, most), (low, high) = view.crop_area, view.crop_aspect
        area = height * width * (least + (most - least) * attempts[:, 0])
        aspect = tf.exp(tf.math.log(low) + (tf.math.log(high) - tf.math.log(low)) * attempts[:, 1])
        heights, widths = tf.round(tf.sqrt(area / aspect)), tf.round(tf.sqrt(area * aspect))
        tall, broad = tf.minimum(height, tf.round(width / low)), tf.minimum(width, tf.round(height * high))
        fallback = [(height - tall) // 2, (width - broad) // 2, tall, broad]
    fits = (heights >= 1) & (widths >= 1) & (heights <= height) & (widths <= width)
    first = tf.argmax(tf.cast(fits, tf.int32), output_type=tf.int32)
    y = tf.floor(attempts[first, 2] * (height - heights[first] + 1))
    x = tf.floor(attempts[first, 3] * (width - widths[first] + 1))
    found = tf.stack([y, x, heights[first], widths[first]])
    return tf.cast(tf.where(tf.reduce_any(fits), found, tf.stack(fallback)), tf.int32)


def _on_grid(uniform: tf.Tensor, bounds: Tuple[float, float]) -> tf.Tensor:
    """Return draws from the points low, low + 0.001, ... high, each as likely."""
    low, high = bounds
    points = round((high - low) / _GRID) + 1
    return low + _GRID * tf.floor(uniform * points)


def _light_window(shape: tf.Tensor, draws: tf.Tensor, share: float) -> tf.Tensor:
    sides = tf.cast(shape[:2], tf.float32)
    side = tf.round(tf.reduce_min(sides) * share)
    corner = tf.floor(draws[2:4] * (sides - side + 1))
    return tf.cast(tf.concat([corner, [side, side]], 0), tf.int32)


def _shift(image: tf.Tensor, draws: tf.Tensor, view: View) -> tf.Tensor:
    """Pad an image by an eighth on each side with zeros and cut its size out at a random place."""
    size, pad = view.image_size, view.image_size // 8
    corner = tf.cast(tf.floor(draws[2:4] * (2 * pad + 1)), tf.int32)
    image = tf.pad(image, [[pad, pad], [pad, pad], [0, 0]])
    return tf.slice(image, tf.concat([corner, [0]], 0), [size, size, 3])


class _Source:
    """An encoded image: its shape, int32 [height, width, channels], and windows of it, resized."""

    def __init__(self, encoded: tf.Tensor, view: View) -> None:
        self._encoded, self._view = encoded, view
        if view.jpeg:
            self.shape = tf.image.extract_jpeg_shape(encoded)
        else:
            self._whole = tf.io.decode_image(encoded, channels=3, expand_animations=False)
            self.shape = tf.shape(self._whole)

    def window(self, window: tf.Tensor) -> tf.Tensor:
        """Return float32 [size, size, 3] of the int32 window [y, x, height, width]."""
        if self._view.jpeg:
            image = tf.image.decode_and_crop_jpeg(self._encoded, window, channels=3)
        else:
            image = tf.slice(self._whole, tf.concat([window[:2], [0]], 0), tf.concat([window[2:], [3]], 0))
        size = self._view.image_size
        image = tf.image.resize(image, [size, size], method=self._view.resize)
        return tf.ensure_shape(image, [size, size, 3])


def normalize(images: tf.Tensor, view: View) -> tf.Tensor:
    """Return images, float32 [..., size, size, 3] RGB 0..255, in the network's channel order, less mean, over scale.

    A product with a 3x3 matrix orders and scales channels in one pass, and what is subtracted has the image's shape:
    together a third of the time of reversing channels and broadcasting three numbers over the last dimension.
    """
    size, scale = view.image_size, np.array(view.scale)
    order = np.eye(3)[::-1] if view.bgr else np.eye(3)
    ordered = tf.matmul(tf.reshape(images, [-1, 3]), tf.constant(order / scale, tf.float32))
    offset = np.broadcast_to((np.array(view.mean) / scale).astype(np.float32), [size, size, 3])
    return tf.reshape(ordered, tf.shape(images)) - tf.constant(offset)
