"""The table of gradients against the network itself, and the orders in which backward yields them."""

import pytest
import tensorflow as tf

from resnet_cpu.errors import FlagError
from resnet_cpu.model import resnet, tensors
from resnet_cpu.settings import DEPTHS, depths_of


def forward_flops(table):
    """Return the FLOPs of forward by kernel: half of those of backward, which computes each product twice.

    Of the first convolution, backward computes only the gradient of the kernel. The work of a layer stands beside the
    first of its tensors.
    """
    work = {}
    for row in table:
        layer = row.name.rpartition("/")[0]
        work[layer] = work.get(layer, 0.0) + row.backward_work
    kernels = [row.name for row in table if row.name.endswith("/kernel")]
    return {name: work[name[: -len("/kernel")]] / (1 if name == "conv1_conv/kernel" else 2) for name in kernels}


@pytest.mark.training
@pytest.mark.parametrize(
    "model, options",
    [
        ("resnet50", {}),
        ("resnet50", {"num_classes": 10, "stem": "small", "conv1_bias": True, "stride_in": "1x1"}),
        ("resnet18", {}),
    ],
)
def test_names_shapes_and_work_are_those_of_the_network(model, options):
    """Work follows from the outputs that the network computes, here of an odd size, where halving rounds."""
    size = 75
    built = resnet.resnet(model, width=0.0625, **options)
    for inter_op_threads in (1, 2):
        table = tensors.gradients(model, 0.0625, image_size=size, inter_op_threads=inter_op_threads, **options)
        assert len(table) == len(built.trainable_variables)
        assert {(f"{row.name}:0", row.shape) for row in table} == {
            (variable.name, tuple(variable.shape)) for variable in built.trainable_variables
        }
    convolutions = [layer for layer in built.layers if layer.name.endswith("_conv")]
    outputs = tf.keras.Model(built.inputs, [layer.output for layer in convolutions])(tf.zeros([1, size, size, 3]))
    pixels = {layer.name: output.shape[1] * output.shape[2] for layer, output in zip(convolutions, outputs)}
    table = tensors.gradients(model, 0.0625, image_size=size, inter_op_threads=2, **options)
    kernels = {row.name: row for row in table if row.name.endswith("_conv/kernel")}
    assert len(kernels) == len(convolutions)
    flops = forward_flops(table)
    for name, row in kernels.items():
        assert flops[name] == 2 * row.elements * pixels[name.split("/")[0]], name


def test_depths_are_those_of_the_network():
    assert tensors.depths_of is resnet.depths_of is depths_of  # one table
    assert depths_of("resnet50") == ((3, 4, 6, 3), True)


@pytest.mark.parametrize(
    "model, count, parameters",
    [("resnet50", 161, 25_557_032), ("resnet18", 62, 11_689_512), ("resnet101", 314, 44_549_160)],
)
def test_counts(model, count, parameters):
    table = tensors.gradients(model)
    assert len(table) == count
    assert sum(row.elements for row in table) == parameters
    assert sum(row.bytes for row in table) == 4 * parameters


def test_resnet50_is_eight_gigaflops():
    """8.2 GFLOP forward at 224x224: 4.1e9 multiply-adds, as torchvision states."""
    assert sum(forward_flops(tensors.gradients()).values()) == pytest.approx(8.18e9, rel=1e-3)


def test_backward_goes_from_the_classifier_to_the_first_convolution():
    names = [row.name for row in tensors.gradients()]
    assert names[:2] == ["logits/bias", "logits/kernel"] and names[-1] == "conv1_conv/kernel"
    place = {name: number for number, name in enumerate(names)}
    for block in ("conv3_block2", "conv5_block1"):
        chain = [f"{block}_{number}_{kind}" for number in (3, 2, 1) for kind in ("bn/gamma", "conv/kernel")]
        assert [place[name] for name in chain] == sorted(place[name] for name in chain)
    # The gradient of the projection comes with that of the last layer of the block, long before that of its first.
    side, main = place["conv5_block1_0_conv/kernel"], place["conv5_block1_2_conv/kernel"]
    assert place["conv5_block1_3_bn/gamma"] < side < main


@pytest.mark.parametrize("depth, counts", [("resnet50", (3, 4, 6, 3)), ("resnet101", (3, 4, 23, 3))])
def test_one_inter_op_thread_leaves_most_kernels_to_the_end(depth, counts):
    """The order of all 54 kernels of ResNet-50 is that of Horovod's timeline. Fault: block 10 counted as part of 1."""
    table = tensors.gradients(depth, inter_op_threads=1)
    kernels = [row.name.replace("_conv/kernel", "") for row in table if row.name.endswith("kernel")]
    early = [f"conv{stage}_block1_{number}" for stage in (5, 4, 3, 2) for number in (1, 2, 3)]
    late = ["conv1"]
    for stage, blocks in zip((2, 3, 4, 5), counts):
        late.append(f"conv{stage}_block1_0")
        late += [f"conv{stage}_block{block}_{number}" for block in range(2, blocks + 1) for number in (1, 2, 3)]
    assert kernels == [*early, *late, "logits/kernel"]


def test_one_inter_op_thread_leaves_most_bytes_to_the_end():
    for order, share in ((1, 0.6), (2, 0.1)):
        table = tensors.gradients(inter_op_threads=order)
        shares = tensors.ready_shares(table)
        sent_late = sum(row.bytes for row, ready in zip(table, shares) if ready > 0.7)
        assert (sent_late > share * 4 * 25_557_032) == (order == 1)


@pytest.mark.parametrize("inter_op_threads", [1, 2])
@pytest.mark.parametrize("model", sorted(DEPTHS))
def test_shares_rise_to_one_and_both_orders_do_the_same_work(model, inter_op_threads):
    table = tensors.gradients(model, width=0.5, inter_op_threads=inter_op_threads)
    shares = tensors.ready_shares(table)
    assert list(shares) == sorted(shares) and shares[0] > 0
    assert shares[-1] == pytest.approx(1, abs=1e-12)
    other = tensors.gradients(model, width=0.5)
    assert sorted(row.name for row in table) == sorted(row.name for row in other)
    assert sum(row.backward_work for row in table) == pytest.approx(sum(row.backward_work for row in other))


def test_a_bias_does_not_change_the_work():
    """With a bias, the bias is the first tensor of its layer and carries the work."""
    total = sum(row.backward_work for row in tensors.gradients(width=0.5))
    assert sum(row.backward_work for row in tensors.gradients(width=0.5, conv1_bias=True)) == total


def test_unknown_model():
    with pytest.raises(FlagError, match="--model=vgg: unknown; use one of resnet18"):
        tensors.gradients("vgg")
