"""Batches: the right examples, the same on any rank and thread, bad records named, and failed reads repeated."""

import dataclasses
import errno
import io
import os

import numpy as np
import pytest
import tensorflow as tf
from conftest import write_tiny_data
from PIL import Image

from resnet_cpu import commandline
from resnet_cpu.cluster.control import World
from resnet_cpu.data import batches, folders, order, preprocess, shards, synthetic
from resnet_cpu.errors import DataError, OutputError
from resnet_cpu.recipe.batch import Batch

pytestmark = pytest.mark.training

SETTINGS = commandline.parse(
    ["--dataset=digits", "--data_dir=unused", "--seed=1", "--image_size=16", "--phase=main:steps=6,lr=0.1"], "train"
)


def with_threads(threads, classes=10):
    return dataclasses.replace(
        SETTINGS,
        data=dataclasses.replace(SETTINGS.data, data_threads=threads),
        model=dataclasses.replace(SETTINGS.model, num_classes=classes),
    )


def training(
    folder,
    rank=0,
    ranks=1,
    batch_size=12,
    first=0,
    last=6,
    augment="full",
    threads=2,
    examples=50,
    data=None,
    most=None,
):
    """Return (ids, images, labels) of a rank's batches; `order` knows the ids. Up to `most` bad ones are skipped."""
    settings = with_threads(threads)
    if most is not None:
        settings = dataclasses.replace(
            settings, data=dataclasses.replace(settings.data, bad_records="skip", max_bad=most)
        )
    found = batches.training_batches(
        settings,
        World(ranks, rank),
        data or folders.open_data(folder, "digits"),
        examples=examples,
        batch=Batch(batch_size, 1, batch_size * ranks),
        first_step=first,
        last_step=last,
        augment=augment,
        image_size=16,
    )
    share = order.Share(1, examples, batch_size, first, last, rank, ranks)
    return [(share.batch(number)[0], *batch) for number, batch in zip(share.numbers, found)]


def evaluation(folder, rank=0, ranks=1, batch_size=8):
    data = folders.open_data(folder, "digits")
    return list(batches.evaluation_batches(with_threads(1), World(ranks, rank), data, batch_size=batch_size))


def view_of(data):
    return preprocess.make_view(SETTINGS.data, data, 16)


def test_batches_follow_the_order_and_hold_the_images_of_their_ids(tiny_data):
    data = folders.open_data(tiny_data, "digits")
    found = training(tiny_data, augment="none")
    assert len(found) == 6
    for ids, images, labels in found:
        for example, image, label in zip(ids, images.numpy(), labels.numpy()):
            parsed = tf.train.Example.FromString(data.train.read(np.array([example]))[0]).features.feature
            encoded = parsed["image/encoded"].bytes_list.value[0]
            np.testing.assert_array_equal(image, preprocess.evaluation_image(encoded, view_of(data)).numpy())
            assert label == parsed["image/class/label"].int64_list.value[0]


def test_an_example_looks_the_same_on_any_rank_in_any_batch_and_on_any_number_of_threads(tiny_data):
    """Augmentation depends on (seed, epoch, id): six steps of 12 from 50 examples cross an epoch border."""
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
    assert any(len(set(images)) == 2 for images in seen.values())  # those of the second epoch differ


def test_starting_in_the_middle_gives_the_same_batches(tiny_data):
    whole, rest = training(tiny_data), training(tiny_data, first=3)
    for (ids, images, labels), (ids2, images2, labels2) in zip(whole[3:], rest):
        np.testing.assert_array_equal(ids, ids2)
        np.testing.assert_array_equal(images, images2)
        np.testing.assert_array_equal(labels, labels2)


def test_fewer_examples_are_the_first_ones(tiny_data):
    labels = np.concatenate([batch[2] for batch in training(tiny_data, examples=20, last=5)])
    assert sorted(labels) == sorted(np.arange(60) % 20 % 10)  # the labels of the tiny data set are id mod 10


def rewrite(folder, split, record, payload):
    """Replace the payload of one record, with shard, index and manifest consistent."""
    data = folders.open_data(folder, "digits")
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


def with_size(content, width, height):
    """Return a JPEG whose header claims another size."""
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + content[at + 4 :]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    "payload, part",
    [
        (with_image(b"<html>not found</html>"), "a web page, not an image"),
        (with_image(b""), "empty, 0 bytes"),
        (with_image(PNG[:-20]), "damaged PNG"),
        (with_image(JPEG[: len(JPEG) // 2]), "damaged JPEG"),
        (with_image(with_size(JPEG, 50_000, 50_000)), "JPEG of 50000 x 50000 pixels, above the limit"),
        (with_image(with_size(JPEG, 8_192, 8_193)), "above the limit"),
        (with_image(PNG[:16] + bytes([0, 1, 0, 0] * 2) + PNG[24:]), "PNG of 65536 x 65536 pixels, above the limit"),
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
            evaluation(folder)
    assert f"{path}: record {record}: " in str(caught.value) and part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_with_a_flipped_bit_is_named(tmp_path):
    folder = str(tmp_path)
    write_tiny_data(folder)
    path, record = folders.open_data(folder, "digits").train.locate(33)
    start = int(shards.read_index(path)[record])
    with open(path, "r+b") as file:
        file.seek(start + 40)
        byte = file.read(1)
        file.seek(start + 40)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DataError, match=f"{os.path.basename(path)}: record {record}: checksum"):
        training(folder)


@pytest.mark.parametrize("kind", ["png", "gif", "bmp"])
def test_an_image_is_decoded_by_its_bytes_whatever_the_set_says(tmp_path, kind):
    """A PNG in a set of JPEGs ended a run, in training and in evaluation."""
    folder = str(tmp_path)
    write_tiny_data(folder)
    if kind == "png":
        content = tf.io.encode_png(np.full([20, 30, 3], 90, np.uint8)).numpy()
    else:
        buffer = io.BytesIO()
        Image.new("RGB", (30, 20), (90, 90, 90)).save(buffer, kind)
        content = buffer.getvalue()
    for split in ("train", "validation"):
        rewrite(folder, split, 19, with_image(content))
    expected = (90.0 - np.array(folders.open_data(folder, "digits").pixel_mean)) / view_of(
        folders.open_data(folder, "digits")
    ).scale
    for found in (training(folder), evaluation(folder)):
        ids = np.concatenate([batch[0] for batch in found])
        images = np.concatenate([batch[1] for batch in found])
        assert 19 in ids
        np.testing.assert_allclose(images[ids == 19], np.broadcast_to(expected, images[ids == 19].shape), atol=1e-4)


def damaged(tmp_path, *records):
    folder = str(tmp_path)
    write_tiny_data(folder)
    paths = [rewrite(folder, "train", record, with_image(JPEG[: len(JPEG) // 2])) for record in records]
    return folder, paths


def test_bad_records_are_skipped_if_asked_and_nothing_else_changes(tmp_path, tiny_data, capfd):
    folder, places = damaged(tmp_path, 19, 20, 49)
    data = folders.open_data(folder, "digits")
    found, whole = training(folder, data=data, most=3), training(tiny_data)
    assert len(found) == len(whole) == 6  # every rank does all of its steps
    assert sorted(data.train.bad) == [19, 20, 49]
    warnings = capfd.readouterr().err.splitlines()
    for path, record in places:
        assert sum(f"skipped: {path}: record {record}: damaged JPEG" in line for line in warnings) == 1
    labels = {19: 1, 20: 1, 49: 0}  # those of examples 21, 21 and 0
    for (ids, images, got), (_, expected, right) in zip(found, whole):
        good = ~np.isin(ids, [19, 20, 49])
        np.testing.assert_array_equal(images.numpy()[good], expected.numpy()[good])
        np.testing.assert_array_equal(got.numpy()[good], right.numpy()[good])
        for example, label in zip(ids[~good], got.numpy()[~good]):
            assert label == labels[example]


def test_what_was_skipped_before_a_restart_does_not_change_the_images(tmp_path):
    folder, _ = damaged(tmp_path, 19, 20, 49)
    whole, rest = training(folder, most=3), training(folder, most=3, first=3)
    for (_, images, _), (_, again, _) in zip(whole[3:], rest):
        np.testing.assert_array_equal(images, again)


def test_more_bad_records_than_allowed_end_the_run(tmp_path):
    folder, _ = damaged(tmp_path, 19, 20, 49)
    with pytest.raises(
        DataError, match="3 bad records, listed above, more than --max_bad=2; find all of them with prepare verify"
    ):
        training(folder, most=2)
    with pytest.raises(DataError, match="damaged JPEG"):  # negative control: by default the first one does
        training(folder)


def test_a_label_outside_the_classes_is_never_skipped(tmp_path):
    """With labels from 0 in a layout that counts from 1, skipping would train on shifted labels."""
    folder = str(tmp_path)
    write_tiny_data(folder)
    rewrite(folder, "train", 19, with_label(10))
    with pytest.raises(DataError, match="label 10 is outside the 10 classes"):
        training(folder, most=5)


def test_bad_records_in_the_sample_of_labels_are_skipped_as_well(tmp_path):
    folder, _ = damaged(tmp_path, 19)
    rewrite(folder, "train", 20, lambda payload: b"junk")
    data, settings = folders.open_data(folder, "digits"), with_threads(1)
    with pytest.raises(DataError, match="damaged JPEG|standard example"):
        batches.check_label_base(settings, data)
    skipping = dataclasses.replace(settings, data=dataclasses.replace(settings.data, bad_records="skip"))
    batches.check_label_base(skipping, data)
    assert 20 in data.train.bad


def test_evaluation_batches_pad_with_the_last_example(tiny_data):
    found = evaluation(tiny_data, rank=1, ranks=2)
    assert [batch[0].tolist() for batch in found] == [list(range(8, 16)), [20] * 8]


def test_synthetic_images_belong_to_their_ids():
    def synthetic_batches(rank, ranks, batch_size):
        return list(
            batches.training_batches(
                with_threads(1, classes=5),
                World(ranks, rank),
                None,
                examples=100,
                batch=Batch(batch_size, 1, batch_size * ranks),
                first_step=0,
                last_step=4,
                augment="none",
                image_size=8,
            )
        )

    whole, halves = synthetic_batches(0, 1, 8), [synthetic_batches(rank, 2, 4) for rank in range(2)]
    pool, _ = synthetic.image_pool(8, 5)
    assert len(whole) == 4
    for step, (images, labels) in enumerate(whole):
        ids = order.Share(1, 100, 8, 0, 4).batch(step)[0]
        np.testing.assert_array_equal(images, pool[ids % synthetic.POOL])
        np.testing.assert_array_equal(labels, ids % synthetic.POOL % 5)
        np.testing.assert_array_equal(images, np.concatenate([half[step][0] for half in halves]))


def test_the_label_base_is_checked_on_256_records_of_each_split(tiny_data, monkeypatch):
    """It read 4,096 of each at every start and evaluation, one after the other, while all ranks waited."""
    data = folders.open_data(tiny_data, "digits")
    reads = []

    class Many:
        """A split of many records, all equal."""

        examples, paths = 1_281_167, data.train.paths

        def read(self, ids):
            reads.append(len(ids))
            assert ids[0] == 0 and ids[-1] == self.examples - 1  # spread over the split
            return data.train.read(np.zeros(len(ids), np.int64))

    batches.check_label_base(SETTINGS, dataclasses.replace(data, train=Many(), validation=Many()))
    assert reads == [256, 256]


@pytest.fixture
def quick_retry(monkeypatch):
    monkeypatch.setattr(shards, "RETRY_AFTER_S", 0.0)


def failing_reads(monkeypatch, failures):
    """Let the next calls of `os.pread` of shards fail as `failures` says: an error number, or a number of bytes cut."""
    real, left = os.pread, list(failures)

    def pread(descriptor, length, offset):
        failure = left.pop(0) if left and length > 0 else None
        if failure is None:
            return real(descriptor, length, offset)
        if failure > 0:
            raise OSError(failure, os.strerror(failure))
        return real(descriptor, length, offset)[:failure]

    monkeypatch.setattr(shards.os, "pread", pread)
    return left


@pytest.mark.parametrize("failure", [errno.EIO, errno.ESTALE, -3])
def test_a_read_that_fails_once_is_repeated(tiny_data, monkeypatch, quick_retry, capfd, failure):
    """An error that did not repeat ended the run as bad data, 65, which no batch file requeues."""
    expected = training(tiny_data)
    failing_reads(monkeypatch, [failure])
    found = training(tiny_data)
    assert all(np.array_equal(one[1], other[1]) for one, other in zip(found, expected)) and len(found) == 6
    assert "read failed" in capfd.readouterr().err


@pytest.mark.parametrize("failure", [errno.EIO, -3])
@pytest.mark.parametrize("read", [training, evaluation])
def test_a_read_that_keeps_failing_ends_as_74_with_file_and_record(tiny_data, monkeypatch, quick_retry, failure, read):
    failing_reads(monkeypatch, [failure] * 1000)
    with pytest.raises(OutputError, match=r"train-\d+-of-\d+|validation-\d+-of-\d+") as caught:
        read(tiny_data)
    assert ": record " in str(caught.value) and "read failed twice" in str(caught.value)
    assert caught.value.exit_code == 74


def failing_decoder(monkeypatch, times):
    """Let decoding fail in TensorFlow for the first `times` images, whatever they are."""
    left = [times]

    def fail(image):
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("a hiccup")
        return image

    original = preprocess.training_image

    def training_image(encoded, *rest):
        image = original(encoded, *rest)
        return tf.ensure_shape(tf.numpy_function(fail, [image], tf.float32), image.shape)

    monkeypatch.setattr(preprocess, "training_image", training_image)


def test_an_error_of_tensorflow_that_does_not_repeat_is_not_one_of_the_data(tiny_data, monkeypatch, capfd):
    expected = training(tiny_data, threads=1)
    failing_decoder(monkeypatch, 1)
    found = training(tiny_data, threads=1)
    assert len(found) == 6
    assert all(np.array_equal(one[1], other[1]) for one, other in zip(found, expected))
    assert "reading it again" in capfd.readouterr().err


def test_an_error_of_tensorflow_that_repeats_with_good_records_ends_as_74(tiny_data, monkeypatch):
    failing_decoder(monkeypatch, 10_000)
    with pytest.raises(OutputError, match="batch 0 of .* could not be read twice") as caught:
        training(tiny_data, threads=1)
    assert "\n" not in str(caught.value)
