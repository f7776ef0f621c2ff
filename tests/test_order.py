"""The order of examples: pure functions, so the tests need neither ranks nor TensorFlow."""

import numpy as np
import pytest

from resnet_cpu.data import order


def ids_of_step(step, ranks, batch, examples, seed=3):
    shares = [order.Share(seed, examples, batch, 0, step + 1, rank, ranks) for rank in range(ranks)]
    return np.concatenate([share.batch(step)[0] for share in shares])


@pytest.mark.parametrize("examples", [17, 48, 50, 101])
def test_the_examples_of_a_step_do_not_depend_on_the_ranks(examples):
    for step in range(20):
        expected = ids_of_step(step, 1, 16, examples)
        for ranks, batch in [(2, 8), (4, 4), (16, 1)]:
            np.testing.assert_array_equal(ids_of_step(step, ranks, batch, examples), expected)


@pytest.mark.parametrize("examples", [48, 50, 101])
def test_each_example_comes_once_per_epoch_and_none_is_dropped_at_the_border(examples):
    steps = 4 * examples  # batches of 12 span the borders
    stream = np.concatenate([ids_of_step(step, 3, 4, examples) for step in range(steps)])
    for epoch in range(len(stream) // examples):
        assert sorted(stream[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


def epochs_differ(permutation):
    orders = [permutation(0, epoch, 1000) for epoch in range(3)]
    return all((orders[a] == orders[b]).sum() <= 10 for a, b in [(0, 1), (0, 2), (1, 2)])


def test_epochs_and_seeds_have_different_orders():
    assert epochs_differ(order.permutation)
    assert (order.permutation(0, 0, 1000) == order.permutation(1, 0, 1000)).sum() <= 10


def test_negative_control_without_the_epoch_key_the_orders_are_the_same():
    assert not epochs_differ(lambda seed, epoch, examples: order.permutation(seed, 0, examples))


def test_the_order_is_that_of_version_0_1():
    """A run begun earlier is continued with the same examples."""
    assert order.permutation(0, 0, 1000)[:6].tolist() == [175, 70, 468, 637, 31, 234]
    share = order.Share(3, 50, 4, 0, 40, 1, 2, micro_batches=2)
    assert share.batch(21)[0].tolist() == [39, 23, 11, 9]


def test_draws_depend_only_on_seed_epoch_and_example():
    ids, epochs = np.array([7, 3, 7, 9]), np.array([0, 0, 1, 1])
    together = order.draws(1, epochs, ids, 41)
    alone = np.concatenate([order.draws(1, epochs[i : i + 1], ids[i : i + 1], 41) for i in range(4)])
    np.testing.assert_array_equal(together, alone)
    assert not np.array_equal(together[0], together[2])
    assert not np.array_equal(together[0], order.draws(2, epochs, ids, 41)[0])


def test_draws_are_uniform():
    values = order.draws(0, np.zeros(5000, np.int64), np.arange(5000), 8)
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    counts, _ = np.histogram(values, 20, (0, 1))
    assert ((counts - 2000) ** 2 / 2000).sum() < 50  # chi-square, 19 degrees of freedom: p = 1e-4
    assert abs(np.corrcoef(values.T) - np.eye(8)).max() < 0.06


@pytest.mark.parametrize("examples", [1, 7, 50, 101])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_evaluation_counts_every_example_once(examples, ranks, batch):
    counts = np.zeros(examples, np.int64)
    for step in range(order.evaluation_steps(ranks, batch, examples)):
        for rank in range(ranks):
            ids, weights = order.evaluation_batch(step, rank, ranks, batch, examples)
            assert len(ids) == batch
            np.add.at(counts, ids, weights)
    assert (counts == 1).all()


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_micro_batches_are_the_slices_of_the_same_number_of_ranks(parts):
    """Two ranks with k micro-batches each read, part by part, what 2k ranks read."""
    for step in (0, 3, 7):
        for rank in range(2):
            share = order.Share(3, 50, 12 // parts, step, step + 1, rank, 2, micro_batches=parts)
            for part, number in enumerate(share.numbers):
                alone = order.Share(3, 50, 12 // parts, 0, step + 1, rank * parts + part, 2 * parts)
                np.testing.assert_array_equal(share.batch(number)[0], alone.batch(step)[0])
