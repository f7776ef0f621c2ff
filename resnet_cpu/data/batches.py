"""tf.data: from (step) to (ids, images, labels), in a fixed order, on threads of its own.

Reading is one Python call a batch, in a map of its own; decoding is pure TensorFlow and runs in parallel.
"""

from typing import Callable, Dict, Iterator, List, Tuple

import numpy as np
import tensorflow as tf

from resnet_cpu.data import order, preprocess
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.data.shards import Split
from resnet_cpu.errors import DataError
from resnet_cpu.settings import Data

PREFETCH = 2  # batches; more only takes memory, since the order of the work is fixed
LABEL_SAMPLE = 4096  # records whose labels are looked at before training; the others are as they are read

# (example ids int64 [batch], images float32 [batch, size, size, 3], labels int64 [batch])
Batch = Tuple[np.ndarray, tf.Tensor, tf.Tensor]


def options(threads: int) -> tf.data.Options:
    """Return tf.data options: deterministic, `threads` private threads, nothing that tunes itself while timing runs."""
    chosen = tf.data.Options()
    chosen.deterministic = True
    chosen.autotune.enabled = False
    chosen.threading.private_threadpool_size = threads
    chosen.threading.max_intra_op_parallelism = 1
    return chosen


def make_view(settings: Data, data: ShardedData, image_size: int) -> preprocess.View:
    """Return how images of `data` are looked at by the flags, at `image_size` pixels."""
    return preprocess.make_view(
        image_size,
        settings.resize,
        settings.eval_crop,
        settings.normalization,
        data.pixel_mean,
        data.pixel_std,
        otherwise="authors" if settings.dataset == "imagenet" else "tf",
        crop=settings.crop,
        crop_area=settings.crop_area,
        crop_aspect=settings.crop_aspect,
        jpeg=data.jpeg,
    )


def features(data: ShardedData) -> Dict[str, tf.io.FixedLenFeature]:
    """Return what to parse of a serialized example."""
    return {
        data.image_key: tf.io.FixedLenFeature([], tf.string),
        data.label_key: tf.io.FixedLenFeature([], tf.int64),
    }


def check_label_base(data: ShardedData, num_classes: int) -> None:
    """Raise DataError if labels, of a sample spread over each split, are not those of the layout.

    What the sample does not show is seen when it is read: no batch with a label outside the classes is trained on.
    """
    for split in (data.train, data.validation):
        ids = np.unique(np.linspace(0, split.examples - 1, LABEL_SAMPLE).astype(np.int64))
        for some in np.array_split(ids, -(-len(ids) // 256)):
            try:
                example = tf.io.parse_example(split.read(some), {data.label_key: features(data)[data.label_key]})
            except tf.errors.OpError as error:
                raise _find_bad_record(data, split, some, error) from None
            check_labels(split, some, example[data.label_key].numpy() - data.label_base, num_classes, data.label_base)


def _decoded(
    numbers: tf.data.Dataset,
    read: Callable[[np.ndarray], Tuple[np.ndarray, np.ndarray, np.ndarray]],
    decode: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    data: ShardedData,
    batch_size: int,
    threads: int,
) -> tf.data.Dataset:
    def parse(ids: tf.Tensor, records: tf.Tensor, draws: tf.Tensor) -> Tuple[tf.Tensor, ...]:
        example = tf.io.parse_example(records, features(data))
        return ids, example[data.image_key], draws, example[data.label_key] - data.label_base

    def read_batch(number: tf.Tensor) -> Tuple[tf.Tensor, ...]:
        ids, records, draws = tf.numpy_function(read, [number], (tf.int64, tf.string, tf.float32), stateful=False)
        return tf.ensure_shape(ids, [batch_size]), tf.ensure_shape(records, [batch_size]), draws

    def decode_one(example: tf.Tensor, encoded: tf.Tensor, draws: tf.Tensor, label: tf.Tensor) -> Tuple[tf.Tensor, ...]:
        return example, decode(encoded, tf.ensure_shape(draws, [preprocess.DRAWS])), label

    examples = numbers.map(read_batch).map(parse).unbatch()
    examples = examples.map(decode_one, num_parallel_calls=threads)
    return examples.batch(batch_size, drop_remainder=True).prefetch(PREFETCH).with_options(options(threads))


def training_batches(
    data: ShardedData,
    view: preprocess.View,
    augment: str,
    share: order.Share,
    *,
    num_classes: int,
    threads: int,
) -> Iterator[Batch]:
    """Yield the micro-batches of `share` in their order; raise DataError on a bad record."""

    def read(number: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, epochs = share.batch(int(number))
        return ids, np.array(data.train.read(ids), object), order.draws(share.seed, epochs, ids, preprocess.DRAWS)

    def decode(encoded: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        return preprocess.training_image(encoded, draws, augment, view)

    batches = _decoded(
        tf.data.Dataset.range(share.numbers.start, share.numbers.stop),
        read,
        decode,
        data,
        share.batch_size,
        threads,
    )
    return _checked(batches, data, data.train, num_classes, lambda n: share.batch(share.numbers[n])[0])


def evaluation_batches(
    data: ShardedData, view: preprocess.View, *, rank: int, ranks: int, batch_size: int, num_classes: int, threads: int
) -> Iterator[Batch]:
    """Yield the evaluation batches of `rank`; their weights are `order.evaluation_batch`'s."""
    examples = data.validation.examples

    def ids_of(step: int) -> np.ndarray:
        return order.evaluation_batch(step, rank, ranks, batch_size, examples)[0]

    def read(step: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = ids_of(int(step))
        return ids, np.array(data.validation.read(ids), object), np.zeros([len(ids), preprocess.DRAWS], np.float32)

    def decode(encoded: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        return preprocess.evaluation_image(encoded, view)

    batches = _decoded(
        tf.data.Dataset.range(order.evaluation_steps(ranks, batch_size, examples)),
        read,
        decode,
        data,
        batch_size,
        threads,
    )
    return _checked(batches, data, data.validation, num_classes, ids_of)


def _checked(
    batches: tf.data.Dataset,
    data: ShardedData,
    split: Split,
    num_classes: int,
    ids_of: Callable[[int], np.ndarray],
) -> Iterator[Batch]:
    """Pass batches on; turn what TensorFlow says of a bad one into the file and the record."""
    iterator = iter(batches)
    number = 0
    while True:
        try:
            ids, images, labels = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            raise _find_bad_record(data, split, ids_of(number), error) from None
        check_labels(split, ids.numpy(), labels.numpy(), num_classes, data.label_base)
        yield ids.numpy(), images, labels
        number += 1


def check_labels(split: Split, ids: np.ndarray, labels: np.ndarray, num_classes: int, label_base: int) -> None:
    """Raise DataError for the first label outside 0 ... num_classes - 1."""
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        path, record = split.locate(ids[outside[0]])
        raise DataError(
            f"{path}: record {record}: label {labels[outside[0]] + label_base} is outside the {num_classes} classes "
            f"{label_base}..{label_base + num_classes - 1} of this layout; correct --num_classes, or the "
            "labels"
        )


def _find_bad_record(data: ShardedData, split: Split, ids: np.ndarray, cause: tf.errors.OpError) -> DataError:
    """Read a failed batch once more, one record at a time, to name the one at fault."""
    for example in ids:
        path, record = split.locate(example)
        try:
            parsed = tf.io.parse_single_example(split.read(np.array([example]))[0], features(data))
            encoded = parsed[data.image_key]
            if data.jpeg:
                shape = tf.image.extract_jpeg_shape(encoded)
                tf.image.decode_and_crop_jpeg(encoded, tf.concat([[0, 0], shape[:2]], 0), channels=3)
            else:
                tf.io.decode_image(encoded, channels=3, expand_animations=False)
        except DataError as error:
            return error
        except tf.errors.OpError as error:
            reason = _first_line(error)
            return DataError(
                f"{path}: record {record}: no {'JPEG ' if data.jpeg else ''}image in a standard example ({reason}); "
                "prepare the data set again"
            )
    return DataError(f"a batch could not be read: {_first_line(cause)}")


def _first_line(error: tf.errors.OpError) -> str:
    lines: List[str] = [line for line in (error.message or type(error).__name__).splitlines() if line.strip()]
    return lines[0].replace("{{function_node __wrapped__", "").strip()[:200]
