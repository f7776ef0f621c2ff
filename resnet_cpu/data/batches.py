"""Batches of training and evaluation images in a fixed order, by tf.data on its own threads.

Reading is one Python call per batch, in a map of its own; decoding is pure TensorFlow and runs in parallel.
"""

import os
import re
import sys
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import tensorflow as tf

from resnet_cpu.cluster.control import World
from resnet_cpu.data import classes, order, preprocess, synthetic
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.data.images import BadImage, Header, read_header
from resnet_cpu.data.shards import Split
from resnet_cpu.errors import DataError, OutputError
from resnet_cpu.recipe.batch import Batch
from resnet_cpu.settings import Settings

PREFETCH = 2  # batches; more would only take memory, since the order of the work is fixed
LABEL_SAMPLE = 256  # records of each split whose labels are checked before training; the others as they are read

# (images float32 [batch, size, size, 3], labels int64 [batch])
TrainingBatch = Tuple[tf.Tensor, tf.Tensor]
# (example ids int64 [batch], images float32 [batch, size, size, 3], labels int64 [batch])
EvaluationBatch = Tuple[np.ndarray, tf.Tensor, tf.Tensor]


def training_batches(
    settings: Settings,
    world: World,
    data: Optional[ShardedData],
    *,
    examples: int,
    batch: Batch,
    first_step: int,
    last_step: int,
    augment: str,
    image_size: int,
) -> Iterator[TrainingBatch]:
    """Yield this rank's micro-batches of the steps first_step ... last_step - 1; synthetic ones without `data`.

    Raises DataError for a bad record, or for the first above --max_bad with --bad_records=skip, and OutputError for one
    that cannot be read.
    """
    share = order.Share(
        seed=settings.recipe.seed,
        examples=examples,
        batch_size=batch.per_rank,
        first_step=first_step,
        last_step=last_step,
        rank=world.rank,
        ranks=world.size,
        micro_batches=batch.accumulate_steps,
    )
    classes, threads = settings.model.num_classes, settings.data.data_threads or world.cores
    if data is None:
        yield from _on_own_threads(synthetic.training_set(image_size, share, classes), threads)
        return
    view = preprocess.make_view(settings.data, data, image_size)
    reader, tolerance = data.train, _tolerance(settings)

    def read(number: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, epochs = share.batch(int(number))
        draws = order.draws(share.seed, epochs, ids, preprocess.DRAWS)
        ids = _without(reader.bad, ids, examples)
        return ids, np.array(reader.read(ids), object), draws

    def decode(encoded: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        return preprocess.training_image(encoded, draws, augment, view)

    def from_number(number: int) -> tf.data.Dataset:
        return _decoded(range(number, share.numbers.stop), read, decode, data, share.batch_size, threads)

    def ids_of(number: int) -> np.ndarray:
        return _without(reader.bad, share.batch(number)[0], examples)

    for _, images, labels in _checked(from_number, share.numbers, data, reader, classes, ids_of, tolerance):
        yield images, labels


def evaluation_batches(
    settings: Settings, world: World, data: ShardedData, *, batch_size: int
) -> Iterator[EvaluationBatch]:
    """Yield this rank's evaluation batches of `batch_size` images; their weights are those of `order.evaluation_batch`.

    Raises DataError for a bad record, OutputError for one that cannot be read.
    """
    examples, reader = data.validation.examples, data.validation
    classes, threads = settings.model.num_classes, settings.data.data_threads or world.cores
    view = preprocess.make_view(settings.data, data, settings.data.image_size)
    steps = range(order.evaluation_steps(world.size, batch_size, examples))

    def ids_of(step: int) -> np.ndarray:
        return order.evaluation_batch(step, world.rank, world.size, batch_size, examples)[0]

    def read(step: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = ids_of(int(step))
        return ids, np.array(reader.read(ids), object), np.zeros([len(ids), preprocess.DRAWS], np.float32)

    def decode(encoded: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        return preprocess.evaluation_image(encoded, view)

    def from_step(step: int) -> tf.data.Dataset:
        return _decoded(range(step, steps.stop), read, decode, data, batch_size, threads)

    yield from _checked(from_step, steps, data, reader, classes, ids_of)


def _on_own_threads(dataset: tf.data.Dataset, threads: int) -> tf.data.Dataset:
    """Return `dataset` with prefetching, in a fixed order, on `threads` private threads, and without autotuning."""
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    return dataset.prefetch(PREFETCH).with_options(options)


def _features(data: ShardedData) -> Dict[str, tf.io.FixedLenFeature]:
    """Return the features to parse from a serialized example."""
    return {
        data.image_key: tf.io.FixedLenFeature([], tf.string),
        data.label_key: tf.io.FixedLenFeature([], tf.int64),
    }


def _decoded(
    numbers: range,
    read: Callable[[np.ndarray], Tuple[np.ndarray, np.ndarray, np.ndarray]],
    decode: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    data: ShardedData,
    batch_size: int,
    threads: int,
) -> tf.data.Dataset:
    """Return the batches `numbers` as a dataset of (ids, images, labels).

    Args:
        read: function from the number of a batch to (ids, serialized examples, random numbers [batch, DRAWS]).
        decode: function from an encoded image and its random numbers [DRAWS] to an image.
    """

    def parse(ids: tf.Tensor, records: tf.Tensor, draws: tf.Tensor) -> Tuple[tf.Tensor, ...]:
        example = tf.io.parse_example(records, _features(data))
        return ids, example[data.image_key], draws, example[data.label_key] - data.label_base

    def read_batch(number: tf.Tensor) -> Tuple[tf.Tensor, ...]:
        ids, records, draws = tf.numpy_function(read, [number], (tf.int64, tf.string, tf.float32), stateful=False)
        return tf.ensure_shape(ids, [batch_size]), tf.ensure_shape(records, [batch_size]), draws

    def decode_one(example: tf.Tensor, encoded: tf.Tensor, draws: tf.Tensor, label: tf.Tensor) -> Tuple[tf.Tensor, ...]:
        return example, decode(encoded, tf.ensure_shape(draws, [preprocess.DRAWS])), label

    batches = tf.data.Dataset.range(numbers.start, numbers.stop).map(read_batch)
    examples = batches.map(parse).unbatch().map(decode_one, num_parallel_calls=threads)
    return _on_own_threads(examples.batch(batch_size, drop_remainder=True), threads)


def _checked(
    batches_from: Callable[[int], tf.data.Dataset],
    numbers: range,
    data: ShardedData,
    split: Split,
    num_classes: int,
    ids_of: Callable[[int], np.ndarray],
    tolerance: int = 0,
) -> Iterator[EvaluationBatch]:
    """Yield the batches `numbers` with their labels checked; turn errors of TensorFlow into those of a file and record.

    An error that does not repeat when the records are read one by one is not one of the data: the batch is read again.
    It is read again as well after bad records were noted in `split.bad`, which holds up to `tolerance` of them.

    Args:
        batches_from: function from the number of a batch to the dataset that begins with it.
        ids_of: function from the number of a batch to its example ids.
    """
    iterator, retried = iter(batches_from(numbers.start)), -1
    number = numbers.start
    while number < numbers.stop:
        try:
            ids, images, labels = next(iterator)
        except tf.errors.OpError as error:
            bad = _find_bad_records(data, split, ids_of(number))
            if bad:
                _note(split, bad, tolerance)
                iterator = iter(batches_from(number))
                continue
            if number == retried:
                raise OutputError(
                    f"batch {number} of {_where(split)} could not be read twice, though each of its records can be "
                    f"({_first_line(error)}); check the file system, then run again"
                ) from None
            reason = f"batch {number} of {_where(split)} could not be read ({_first_line(error)})"
            print(f"WARNING: {reason}; reading it again", file=sys.stderr, flush=True)
            iterator, retried = iter(batches_from(number)), number
            continue
        # Never skipped: a label outside the classes is a sign that the others have another meaning as well.
        _check_labels(split, ids.numpy(), labels.numpy(), num_classes, data.label_base)
        yield ids.numpy(), images, labels
        number += 1


def check_label_base(settings: Settings, data: ShardedData) -> None:
    """Raise DataError if the labels of a sample from each split are not in the range of the layout.

    Labels beside WordNet ids must also be in their order, see `classes.check_order`. The labels of all other records
    are checked when they are read, so that none outside the classes is trained on.
    """
    found: List[classes.Labelled] = []
    for split in data.splits:
        ids = np.unique(np.linspace(0, split.examples - 1, LABEL_SAMPLE).astype(np.int64))
        try:
            labels, synsets = _labels_of(data, split, ids)
        except (tf.errors.OpError, DataError) as error:
            bad = _find_bad_records(data, split, ids)
            if not bad:
                raise DataError(
                    f"{_where(split)}: labels cannot be read ({error}); prepare the data set again"
                ) from None
            _note(split, bad, _tolerance(settings) if split is data.train else 0)
            ids = np.array([example for example in ids.tolist() if example not in bad])
            labels, synsets = _labels_of(data, split, ids)
        _check_labels(split, ids, labels, settings.model.num_classes, data.label_base)
        found += classes.labelled(split, ids, labels + data.label_base, synsets)
    classes.check_order(found)


def _labels_of(data: ShardedData, split: Split, ids: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return the labels of examples, counted from 0, and their WordNet ids, empty for records without one."""
    features = {
        data.label_key: _features(data)[data.label_key],
        classes.SYNSET_KEY: tf.io.FixedLenFeature([], tf.string, b""),
    }
    parsed = tf.io.parse_example(split.read(ids), features)
    return parsed[data.label_key].numpy() - data.label_base, parsed[classes.SYNSET_KEY].numpy()


def _tolerance(settings: Settings) -> int:
    """Return the number of bad training records that a rank skips."""
    return settings.data.max_bad if settings.data.bad_records == "skip" else 0


def _check_labels(split: Split, ids: np.ndarray, labels: np.ndarray, num_classes: int, label_base: int) -> None:
    """Raise DataError for the first label outside 0 ... num_classes - 1."""
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        path, record = split.locate(ids[outside[0]])
        raise DataError(
            f"{path}: record {record}: label {labels[outside[0]] + label_base} is outside the {num_classes} classes "
            f"{label_base}..{label_base + num_classes - 1} of this layout; correct --num_classes or the labels"
        )


def _without(bad: Dict[int, DataError], ids: np.ndarray, examples: int) -> np.ndarray:
    """Return the ids with each bad one replaced by the next that is not; there are `examples` to choose from.

    The number of images per step stays the same on all ranks, and the choice depends on the data only.
    """
    if bad and set(bad).issuperset(range(examples)):
        raise DataError("all training images are bad; prepare the data set again")
    replaced = ids.copy()
    for place in np.flatnonzero(np.isin(ids, list(bad))) if bad else ():
        while replaced[place] in bad:
            replaced[place] = (replaced[place] + 1) % examples
    return replaced


def _note(split: Split, bad: Dict[int, DataError], tolerance: int) -> None:
    """Add bad records to those of the split; raise the error of the first one if there are more than `tolerance`."""
    if not tolerance:
        raise next(iter(bad.values())) from None
    for example, error in bad.items():
        print(f"WARNING: skipped: {error}", file=sys.stderr, flush=True)
        split.bad[example] = error
    if len(split.bad) > tolerance:
        raise DataError(
            f"{_where(split)}: {len(split.bad)} bad records, listed above, more than --max_bad={tolerance}; find all "
            "of them with prepare verify, or raise --max_bad"
        )


def _find_bad_records(data: ShardedData, split: Split, ids: np.ndarray) -> Dict[int, DataError]:
    """Read the records of a failed batch one by one; return the bad ones with their errors.

    Raises OutputError for a record that cannot be read.
    """
    found: Dict[int, DataError] = {}
    for example in ids.tolist():
        path, record = split.locate(example)
        try:
            parsed = tf.io.parse_single_example(split.read(np.array([example]))[0], _features(data))
            check_image(parsed[data.image_key].numpy())
        except DataError as error:
            found[example] = error
        except BadImage as error:
            found[example] = DataError(f"{path}: record {record}: {error}; prepare the data set again")
        except tf.errors.OpError as error:
            found[example] = DataError(f"{path}: record {record}: {not_an_example(error)}; prepare the data set again")
    return found


def check_image(encoded: bytes) -> Header:
    """Decode an image as training does, and return its header; raise BadImage if that fails."""
    header = read_header(encoded)
    try:
        tf.io.decode_image(encoded, channels=3, expand_animations=False)
    except tf.errors.OpError as error:
        raise BadImage(f"damaged {header.format} ({_first_line(error)})") from None
    return header


def not_an_example(error: tf.errors.OpError) -> str:
    """Return what is wrong with a record that TensorFlow could not parse."""
    return f"not a standard example ({_first_line(error)})"


def _where(split: Split) -> str:
    return os.path.dirname(split.paths[0])


def _first_line(error: tf.errors.OpError) -> str:
    """Return the first line of TensorFlow's message, without the name of the operation's node."""
    lines: List[str] = [line for line in (error.message or type(error).__name__).splitlines() if line.strip()]
    return re.sub(r"\{\{.*?\}\}", "", lines[0]).strip()[:200]
