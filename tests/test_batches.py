"""Batches: the right examples, the same whatever the rank or the threads, and bad records named."""

import os

import numpy as np
import pytest
import tensorflow as tf
from conftest import write_tiny_data

from resnet_cpu.data import batches as pipeline
from resnet_cpu.data import folders as layouts
from resnet_cpu.data import order, preprocess, shards, synthetic
from resnet_cpu.errors import DataError

VIEW = preprocess.make_view(16, "bilinear", 1.0, "dataset", (100.0,) * 3, (50.0,) * 3)


def training(
    folder, rank=0, ranks=1, batch_size=12, first=0, last=6, augment="full", threads=2, classes=10, examples=50
):
    data = layouts.open_data(folder, "digits")
    share = order.Share(1, examples, batch_size, first, last, rank, ranks)
    return list(pipeline.training_batches(data, VIEW, augment, share, num_classes=classes, threads=threads))


def test_batches_follow_the_order_and_hold_the_images_of_their_ids(tiny_data):
    data = layouts.open_data(tiny_data, "digits")
    for step, (ids, images, labels) in enumerate(training(tiny_data, augment="none")):
        np.testing.assert_array_equal(ids, order.Share(1, 50, 12, 0, 6).batch(step)[0])
        for example, image, label in zip(ids, images.numpy(), labels.numpy()):
            parsed = tf.train.Example.FromString(data.train.read(np.array([example]))[0]).features.feature
            encoded = parsed["image/encoded"].bytes_list.value[0]
            np.testing.assert_array_equal(image, preprocess.evaluation_image(encoded, VIEW).numpy())
            assert label == parsed["image/class/label"].int64_list.value[0]


def test_an_example_looks_the_same_whatever_the_rank_the_batch_and_the_threads(tiny_data):
    """Keyed by (seed, epoch, id): six steps of 12 from 50 examples cross an epoch border."""
    seen = {}
    for ids, images, _ in training(tiny_data, threads=1):
        for place, image in enumerate(images.numpy()):
            seen.setdefault(int(ids[place]), []).append(image.tobytes())
    for ranks, batch_size, threads in [(2, 6, 3), (4, 3, 1)]:
        again = {}
        streams = [training(tiny_data, rank, ranks, batch_size, threads=threads) for rank in range(ranks)]
        for step in range(6):
            for stream in streams:
                ids, images, _ = stream[step]
                for place, image in enumerate(images.numpy()):
                    again.setdefault(int(ids[place]), []).append(image.tobytes())
        assert again == seen
    assert any(len(set(images)) == 2 for images in seen.values())  # the second epoch's are others


def test_starting_in_the_middle_gives_the_same_batches(tiny_data):
    whole, rest = training(tiny_data), training(tiny_data, first=3)
    for (ids, images, labels), (ids2, images2, labels2) in zip(whole[3:], rest):
        np.testing.assert_array_equal(ids, ids2)
        np.testing.assert_array_equal(images, images2)
        np.testing.assert_array_equal(labels, labels2)


def test_fewer_examples_are_the_first_ones(tiny_data):
    ids = np.concatenate([batch[0] for batch in training(tiny_data, examples=20)])
    assert set(ids) == set(range(20))


def rewrite(folder, split, record, payload):
    """Replace one record's payload and make shard, index and manifest agree with it again."""
    data = layouts.open_data(folder, "digits")
    chosen = getattr(data, split)
    payloads = chosen.read(np.arange(chosen.examples))
    payloads[record] = payload(payloads[record])
    manifest = shards.read_manifest(folder)
    rows = shards.write_split(folder, split, iter(payloads), len(payloads), len(chosen.paths))
    shards.write_manifest(folder, {**manifest, "splits": {**manifest["splits"], split: rows}})
    return chosen.locate(record)


def with_image(content):
    def change(payload):
        example = tf.train.Example.FromString(payload)
        example.features.feature["image/encoded"].bytes_list.value[0] = content
        return example.SerializeToString()

    return change


def with_label(label):
    def change(payload):
        example = tf.train.Example.FromString(payload)
        example.features.feature["image/class/label"].int64_list.value[0] = label
        return example.SerializeToString()

    return change


PNG = tf.io.encode_png(np.zeros([16, 16, 3], np.uint8)).numpy()
JPEG = tf.io.encode_jpeg(np.random.default_rng(0).integers(0, 255, [16, 16, 3]).astype(np.uint8)).numpy()


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    "payload, part",
    [
        (with_image(b"<html>not found</html>"), "no JPEG image"),
        (with_image(b""), "no JPEG image"),
        (with_image(PNG), "no JPEG image"),
        (with_image(JPEG[: len(JPEG) // 2]), "no JPEG image"),
        (with_label(10), "label 10 is outside the 10 classes"),
        (with_label(-1), "label -1 is outside"),
        (lambda payload: b"junk", "standard example"),
        (lambda payload: tf.train.Example().SerializeToString(), "standard example"),
    ],
)
def test_a_bad_record_is_named(tmp_path, split, payload, part):
    folder = str(tmp_path)
    write_tiny_data(folder)
    path, record = rewrite(folder, split, 19, payload)
    with pytest.raises(DataError) as caught:
        if split == "train":
            training(folder)
        else:
            list(
                pipeline.evaluation_batches(
                    layouts.open_data(folder, "digits"), VIEW, rank=0, ranks=1, batch_size=8, num_classes=10, threads=1
                )
            )
    assert f"{path}: record {record}: " in str(caught.value) and part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_named_through_the_pipeline(tmp_path):
    folder = str(tmp_path)
    write_tiny_data(folder)
    path, record = layouts.open_data(folder, "digits").train.locate(33)
    start = int(shards.read_index(path)[record])
    with open(path, "r+b") as file:
        file.seek(start + 40)
        byte = file.read(1)
        file.seek(start + 40)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DataError, match=f"{os.path.basename(path)}: record {record}: checksum"):
        training(folder)


def test_evaluation_batches_pad_with_the_last_example(tiny_data):
    data = layouts.open_data(tiny_data, "digits")
    batches = list(pipeline.evaluation_batches(data, VIEW, rank=1, ranks=2, batch_size=8, num_classes=10, threads=1))
    assert [batch[0].tolist() for batch in batches] == [list(range(8, 16)), [20] * 8]


def test_synthetic_images_belong_to_their_ids():
    def batches(rank, ranks, batch_size):
        share = order.Share(0, 100, batch_size, 0, 4, rank, ranks)
        return list(synthetic.training_batches(8, share, num_classes=5, threads=1))

    whole, halves = batches(0, 1, 8), [batches(rank, 2, 4) for rank in range(2)]
    pool, _ = synthetic.image_pool(8, 5)
    for step, (ids, images, labels) in enumerate(whole):
        np.testing.assert_array_equal(images, pool[ids % synthetic.POOL])
        np.testing.assert_array_equal(labels, ids % synthetic.POOL % 5)
        np.testing.assert_array_equal(images, np.concatenate([half[step][1] for half in halves]))
