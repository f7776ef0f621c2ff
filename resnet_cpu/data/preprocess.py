"""From the bytes of an image to the input of the network; TensorFlow, one example at a time.

Only the cropped window of a JPEG is decoded: blocks outside of it skip the inverse cosine transform.
"""

import dataclasses
from typing import Dict, Tuple

import numpy as np
import tensorflow as tf

from resnet_cpu.data import images
from resnet_cpu.data.datasets import normalization_of
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.settings import Data

CROP_ATTEMPTS = 10
CROP_ASPECT = (0.75, 1.3333)  # inception: width / height of the crop; authors: the square root of its aspect ratio
DRAWS = 5 * CROP_ATTEMPTS + 1  # (area, aspect, y, x, swap) for each attempt, and the flip
_TOO_LARGE = "the image is above the limit of pixels"  # `images.read_header` words it for people
_GRID = 0.001  # of the authors' Caffe, for area and aspect

# Mean and scale of pixels 0..255; the first is the authors' (sara-nl/caffe train_val.prototxt: BGR order, x 1/128).
_FLAVOURS: Dict[str, Tuple[Tuple[float, ...], Tuple[float, ...], bool]] = {
    "authors": ((104.0, 117.0, 123.0), (128.0,) * 3, True),
    "torch": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False),
    "tf": ((127.5,) * 3, (127.5,) * 3, False),
}


@dataclasses.dataclass(frozen=True)
class View:
    """How images are cropped, resized and normalised, in training and evaluation; made by `make_view` only."""

    image_size: int  # pixels
    resize: str  # bilinear or bicubic
    eval_crop: float  # share of the short side
    mean: Tuple[float, ...]  # of pixels 0..255, in the channel order of the network
    scale: Tuple[float, ...]
    bgr: bool
    crop: str  # inception or authors
    crop_area: Tuple[float, float]  # share of the image, least and most


def make_view(settings: Data, data: ShardedData, image_size: int) -> View:
    """Return the view of the images of `data` by the settings, at `image_size` pixels."""
    normalization = normalization_of(settings.normalization, settings.dataset, data.pixel_mean is not None)
    if normalization == "dataset":
        assert data.pixel_mean is not None and data.pixel_std is not None  # `training.opening` has refused it
        mean, scale, bgr = data.pixel_mean, data.pixel_std, False
    else:
        mean, scale, bgr = _FLAVOURS[normalization]
    return View(
        image_size=image_size,
        resize=settings.resize,
        eval_crop=settings.eval_crop,
        mean=mean,
        scale=scale,
        bgr=bgr,
        crop=settings.crop,
        crop_area=settings.crop_area,
    )


def training_image(encoded: tf.Tensor, draws: tf.Tensor, augment: str, view: View) -> tf.Tensor:
    """Return a training image, float32 [size, size, 3], augmented by `draws`, float32 [DRAWS] uniform in [0, 1).

    full: a window of random area and aspect, flipped with probability 1/2. light: a square of the size used in
    evaluation at a random position, flipped with probability 1/2; if that is the whole short side, the square is padded
    by an eighth and cropped at a random position. none: as in evaluation.
    """
    if augment == "none":
        return evaluation_image(encoded, view)
    source = _Source(encoded, view)
    shape = source.shape
    if augment == "full":
        window = _area_window(shape, draws, view)
    else:
        # The numbers that shift a whole image do not choose its square as well.
        window = _light_window(shape, draws[2:4] if view.eval_crop < 1 else draws[7:9], view.eval_crop)
    image = source.window(window)
    if augment == "light" and view.eval_crop >= 1:
        image = _shift(image, draws, view)
    image = normalize(image, view)
    return tf.cond(draws[-1] < 0.5, lambda: tf.reverse(image, [1]), lambda: image)


def evaluation_image(encoded: tf.Tensor, view: View) -> tf.Tensor:
    """Return the image for evaluation, float32 [size, size, 3]: its centre square of `eval_crop` of the short side."""
    source = _Source(encoded, view)
    shape = source.shape[:2]
    if view.eval_crop < 1:
        side = tf.cast(tf.round(tf.cast(tf.reduce_min(shape), tf.float32) * view.eval_crop), tf.int32)
        sides = tf.stack([side, side])
    else:
        sides = tf.fill([2], tf.reduce_min(shape))
    return normalize(source.window(tf.concat([(shape - sides) // 2, sides], 0)), view)


def _area_window(shape: tf.Tensor, draws: tf.Tensor, view: View) -> tf.Tensor:
    """Return the window int32 [y, x, height, width] of the first attempt that fits, else the fallback.

    inception: area uniform, aspect log-uniform; the fallback is the largest centre window of an allowed aspect (Szegedy
    et al., arXiv 1409.4842, as in the examples of PyTorch and TensorFlow). authors: area A and a number c uniform on a
    grid, height sqrt(A)*c, width sqrt(A)/c, swapped with probability 1/2, so that the aspect is the square of c
    (9/16 ... 16/9 for c in 3/4 ... 4/3); the fallback is a square of the short side at a random position
    (`random_aspect_ratio_param` of the authors' Caffe, data_transformer.cpp).
    """
    height, width = tf.cast(shape[0], tf.float32), tf.cast(shape[1], tf.float32)
    attempts = tf.reshape(draws[:-1], [CROP_ATTEMPTS, 5])
    if view.crop == "authors":
        area = height * width * _on_grid(attempts[:, 0], view.crop_area)
        root = _on_grid(attempts[:, 1], CROP_ASPECT)
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
        (least, most), (low, high) = view.crop_area, CROP_ASPECT
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
    """Return values from low, low + 0.001, ... high, all with the same probability."""
    low, high = bounds
    points = round((high - low) / _GRID) + 1
    return low + _GRID * tf.floor(uniform * points)


def _light_window(shape: tf.Tensor, position: tf.Tensor, share: float) -> tf.Tensor:
    """Return a square window of `share` of the short side, at `position`, uniform in [0, 1)."""
    sides = tf.cast(shape[:2], tf.float32)
    side = tf.round(tf.reduce_min(sides) * share)
    corner = tf.floor(position * (sides - side + 1))
    return tf.cast(tf.concat([corner, [side, side]], 0), tf.int32)


def _shift(image: tf.Tensor, draws: tf.Tensor, view: View) -> tf.Tensor:
    """Pad an image by an eighth on each side with zeros and crop its size at a random position."""
    size, pad = view.image_size, view.image_size // 8
    corner = tf.cast(tf.floor(draws[2:4] * (2 * pad + 1)), tf.int32)
    image = tf.pad(image, [[pad, pad], [pad, pad], [0, 0]])
    return tf.slice(image, tf.concat([corner, [0]], 0), [size, size, 3])


class _Source:
    """An encoded image: its shape, int32 [height, width, channels], and windows of it, resized.

    The format is that of the bytes, whatever the data set says: JPEG, PNG, GIF (its first frame) or BMP.
    """

    def __init__(self, encoded: tf.Tensor, view: View) -> None:
        self._encoded, self._view, self._is_jpeg = encoded, view, tf.io.is_jpeg(encoded)

        def jpeg() -> Tuple[tf.Tensor, tf.Tensor]:
            shape = tf.image.extract_jpeg_shape(encoded)
            small = (tf.reduce_max(shape[:2]) <= images.MOST_PIXELS_A_SIDE) & (
                tf.cast(shape[0], tf.int64) * tf.cast(shape[1], tf.int64) <= images.MOST_PIXELS
            )
            with tf.control_dependencies([tf.debugging.Assert(small, [_TOO_LARGE])]):
                return tf.identity(shape), tf.zeros([0, 0, 3], tf.uint8)

        def other() -> Tuple[tf.Tensor, tf.Tensor]:
            (checked,) = tf.numpy_function(_checked, [encoded], [tf.string])
            whole = tf.io.decode_image(tf.ensure_shape(checked, []), channels=3, expand_animations=False)
            return tf.shape(whole), whole

        self.shape, self._whole = tf.cond(self._is_jpeg, jpeg, other)
        self.shape = tf.ensure_shape(self.shape, [3])

    def window(self, window: tf.Tensor) -> tf.Tensor:
        """Return float32 [size, size, 3] of the int32 window [y, x, height, width]."""

        def jpeg() -> tf.Tensor:  # blocks outside of the window are not transformed
            return tf.image.decode_and_crop_jpeg(self._encoded, window, channels=3)

        def other() -> tf.Tensor:
            return tf.slice(self._whole, tf.concat([window[:2], [0]], 0), tf.concat([window[2:], [3]], 0))

        image = tf.ensure_shape(tf.cond(self._is_jpeg, jpeg, other), [None, None, 3])
        size = self._view.image_size
        image = tf.image.resize(image, [size, size], method=self._view.resize)
        return tf.ensure_shape(image, [size, size, 3])


def _checked(encoded: bytes) -> bytes:
    """Return the image; raise BadImage if its size is above the limits."""
    images.read_header(encoded)
    return encoded


def normalize(pixels: tf.Tensor, view: View) -> tf.Tensor:
    """Return (pixels - mean) / scale in the channel order of the network; float32 [..., size, size, 3], RGB 0..255.

    A product with a 3x3 matrix reorders and scales channels in one pass, and the subtracted offset has the shape of the
    image: this takes a third of the time of reversing channels and broadcasting three numbers.
    """
    size, scale = view.image_size, np.array(view.scale)
    order = np.eye(3)[::-1] if view.bgr else np.eye(3)
    ordered = tf.matmul(tf.reshape(pixels, [-1, 3]), tf.constant(order / scale, tf.float32))
    offset = np.broadcast_to((np.array(view.mean) / scale).astype(np.float32), [size, size, 3])
    return tf.reshape(ordered, tf.shape(pixels)) - tf.constant(offset)
