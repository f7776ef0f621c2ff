"""From bytes to pixels, against numpy."""

import dataclasses
import types

import numpy as np
import pytest
import tensorflow as tf

from resnet_cpu.data import order, preprocess
from resnet_cpu.settings import Data

GREY = ((0.0,) * 3, (1.0,) * 3)


def jpeg(height, width):
    """A smooth colour picture, so that resampling is well-conditioned."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([y * 255 / height, x * 255 / width, (y + x) * 127 / (height + width)], -1)
    return tf.io.encode_jpeg(image.astype(np.uint8), quality=95).numpy()


def view(size=16, resize="bilinear", eval_crop=1.0, normalization="dataset", pixels=GREY, **more):
    settings = Data(resize=resize, eval_crop=eval_crop, normalization=normalization, **more)
    data = types.SimpleNamespace(pixel_mean=pixels[0], pixel_std=pixels[1])
    return preprocess.make_view(settings, data, size)


def draws(ids, seed=0, epoch=0):
    ids = np.array(ids)
    return order.draws(seed, np.full(len(ids), epoch), ids, preprocess.DRAWS)


def decoded(encoded):
    return tf.io.decode_jpeg(encoded, channels=3).numpy().astype(np.float32)


def test_window_decoding_equals_decoding_all_and_cutting():
    encoded = jpeg(70, 90)
    for example in range(20):
        window = preprocess._area_window(tf.constant([70, 90, 3]), tf.constant(draws([example])[0]), view()).numpy()
        y, x, height, width = window
        cut = decoded(encoded)[y : y + height, x : x + width]
        found = tf.image.decode_and_crop_jpeg(encoded, window, channels=3).numpy().astype(np.float32)
        np.testing.assert_array_equal(found[2:-2, 2:-2], cut[2:-2, 2:-2])
        # At the border libjpeg interpolates colour only from the window that it has decoded.
        np.testing.assert_allclose(found, cut, atol=4)


def windows(shape, rows, **fields):
    """Return (y, x, heights, widths) of the windows for `rows` of draws."""
    chosen = dataclasses.replace(view(), **fields)
    make = tf.function(lambda row: preprocess._area_window(tf.constant([*shape, 3]), row, chosen))
    return np.array([make(tf.constant(row)).numpy() for row in rows]).T


@pytest.mark.parametrize(
    "crop, aspect_of, least, most",
    [
        ("inception", (0.75, 1.3333), (0.70, 0.80), (1.25, 1.43)),
        ("inception", (0.9, 1.1), (0.86, 0.95), (1.05, 1.15)),
        ("authors", (0.75, 1.3333), (0.5, 0.62), (1.6, 1.95)),  # the square of c: wider
    ],
)
def test_area_windows_lie_inside_and_spread_over_area_and_aspect(monkeypatch, crop, aspect_of, least, most):
    height, width = 60, 80
    monkeypatch.setattr(preprocess, "CROP_ASPECT", aspect_of)
    y, x, heights, widths = windows((height, width), draws(range(400)), crop=crop)
    assert (y >= 0).all() and (x >= 0).all() and (y + heights <= height).all() and (x + widths <= width).all()
    area, aspect = heights * widths / (height * width), widths / heights
    assert 0.07 < area.min() < 0.15 and area.max() > (0.78 if aspect_of == (0.9, 1.1) else 0.9)
    assert least[0] < aspect.min() < least[1] and most[0] < aspect.max() < most[1]
    _, _, heights, widths = windows((height, width), draws(range(100)), crop=crop, crop_area=(0.5, 0.6))
    area = heights * widths / (height * width)
    assert area.min() > 0.47 and area.max() < 0.63


def test_the_authors_window_follows_their_formula():
    """A and c on a grid of 0.001, height sqrt(A)*c, width sqrt(A)/c, swapped with probability 1/2; in float64."""
    height, width = 300, 400
    rows = draws(range(200))
    found = windows((height, width), rows, crop="authors", crop_area=(0.08, 0.5))
    for row, (y, x, tall, broad) in zip(rows.astype(np.float64), found.T):
        for area, c, down, right, swap in row[:-1].reshape(-1, 5):
            a = height * width * (0.08 + 0.001 * np.floor(area * 421))
            c = 0.75 + 0.001 * np.floor(c * 584)
            sides = np.sqrt(a) * c, np.sqrt(a) / c
            expected = sides if swap >= 0.5 else sides[::-1]
            if np.round(expected[0]) <= height and np.round(expected[1]) <= width:
                place = np.array([down, right])
                break
        np.testing.assert_allclose((tall, broad), expected, atol=0.6)
        np.testing.assert_allclose((y, x), place * np.array([height - tall, width - broad]), atol=1.1)


def test_where_no_window_fits_authors_takes_a_square_and_inception_the_centre():
    rows = draws(range(30))
    y, x, heights, widths = windows((10, 400), rows, crop="authors", crop_area=(0.9, 1.0))
    assert (heights == 10).all() and (widths == 10).all() and (y == 0).all() and len(set(x)) > 15
    y, x, heights, widths = windows((10, 400), rows, crop_area=(0.9, 1.0))
    assert (heights == 10).all() and (widths == 13).all() and (x == (400 - 13) // 2).all()


@pytest.mark.parametrize("augment", ["full", "light", "none"])
@pytest.mark.parametrize("eval_crop", [0.875, 1.0])
def test_sizes_and_flips(augment, eval_crop):
    encoded = jpeg(50, 40)
    chance = draws([5])[0]
    plain, flipped = chance.copy(), chance.copy()
    plain[-1], flipped[-1] = 0.9, 0.1
    images = [
        preprocess.training_image(encoded, row, augment, view(eval_crop=eval_crop)).numpy() for row in (plain, flipped)
    ]
    assert images[0].shape == (16, 16, 3)
    mirrored = images[1] if augment == "none" else images[1][:, ::-1]
    np.testing.assert_array_equal(mirrored, images[0])


def test_augmentation_differs_between_epochs_and_examples():
    encoded = jpeg(50, 40)
    images = [
        preprocess.training_image(encoded, draws([example], epoch=epoch)[0], "full", view()).numpy()
        for example, epoch in [(1, 0), (1, 1), (2, 0), (1, 0)]
    ]
    assert not np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    np.testing.assert_array_equal(images[0], images[3])


def test_light_on_small_images_shifts_by_at_most_an_eighth():
    encoded = jpeg(16, 16)
    whole = preprocess.evaluation_image(encoded, view()).numpy()
    padded = np.pad(whole, [(2, 2), (2, 2), (0, 0)])
    corners = set()
    for example in range(60):
        row = draws([example])[0]
        row[-1] = 0.9
        image = preprocess.training_image(encoded, row, "light", view()).numpy()
        places = [(y, x) for y in range(5) for x in range(5) if np.array_equal(padded[y : y + 16, x : x + 16], image)]
        assert places
        corners.add(places[0])
    assert len(corners) > 15


@pytest.mark.parametrize("shape", [(16, 24), (28, 16)])
def test_light_on_whole_images_keeps_their_proportions(shape):
    """As in evaluation, it is a square of the short side; an image that is not square is not squeezed into one."""
    encoded, row = jpeg(*shape), draws([3])[0]
    row[-1], row[2:4] = 0.9, 0.5  # no flip and no shift
    image = preprocess.training_image(encoded, row, "light", view()).numpy()
    pixels = decoded(encoded)
    squares = [pixels[y : y + 16, x : x + 16] for y in range(shape[0] - 15) for x in range(shape[1] - 15)]
    differences = [np.abs(preprocess.normalize(tf.constant(one), view()).numpy() - image).max() for one in squares]
    assert min(differences) <= 4 < sorted(differences)[1]  # at the border libjpeg interpolates colour


@pytest.mark.parametrize("shape", [(64, 64), (64, 100), (101, 64)])
def test_evaluation_uses_the_centre(shape):
    encoded = jpeg(*shape)
    side = round(64 * 0.875)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    cut = decoded(encoded)[top : top + side, left : left + side]
    expected = tf.image.resize(cut, [16, 16], "bilinear").numpy()
    np.testing.assert_array_equal(preprocess.evaluation_image(encoded, view(eval_crop=0.875)).numpy(), expected)


def test_normalizations():
    encoded = jpeg(16, 16)
    pixels = decoded(encoded)
    authors = preprocess.evaluation_image(encoded, view(normalization="authors")).numpy()
    np.testing.assert_allclose(authors, (pixels[:, :, ::-1] - [104, 117, 123]) / 128, atol=1e-5)
    ranged = preprocess.evaluation_image(encoded, view(normalization="tf")).numpy()
    np.testing.assert_allclose(ranged, pixels / 127.5 - 1, atol=1e-5)
    own = view(normalization="auto", dataset="folder", pixels=((10.0, 20.0, 30.0), (2.0, 4.0, 5.0)))
    np.testing.assert_allclose(
        preprocess.evaluation_image(encoded, own).numpy(), (pixels - [10, 20, 30]) / [2, 4, 5], rtol=1e-5, atol=1e-5
    )


def test_bicubic_differs_from_bilinear():
    encoded = jpeg(40, 40)
    linear, cubic = (
        preprocess.evaluation_image(encoded, view(resize=kind)).numpy() for kind in ("bilinear", "bicubic")
    )
    assert 0 < np.abs(linear - cubic).max() < 20


def test_imagenet_is_normalised_as_by_the_authors_whoever_wrote_its_shards():
    assert view(normalization="auto", pixels=((1.0,) * 3, (2.0,) * 3)) == view(normalization="authors")


@pytest.mark.parametrize("dataset, flavour", [("imagenet", "authors"), ("tfds:x", "tf")])
def test_auto_without_measured_pixels(dataset, flavour):
    assert view(normalization="auto", dataset=dataset, pixels=(None, None)) == view(normalization=flavour)


def test_the_view_of_the_tests_is_that_of_runs():
    """Runs used an aspect of 0.75 ... 1.3333 and views built without flags 3/4 ... 4/3: now there is one constant."""
    assert preprocess.CROP_ASPECT == (0.75, 1.3333)
    names = [field.name for field in dataclasses.fields(preprocess.View)]
    assert "crop_aspect" not in names
    assert not [f.name for f in dataclasses.fields(preprocess.View) if f.default is not dataclasses.MISSING]
    assert view().crop == Data().crop and view().crop_area == Data().crop_area == (0.08, 1.0)
