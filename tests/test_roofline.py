"""benchmarks/step_bound.py: what the bound of a step of ResNet-50 counts."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import step_bound


@pytest.fixture(scope="module")
def network():
    import tensorflow as tf

    from resnet_cpu.model import resnet

    model = resnet.resnet50()
    return tf.keras.models.clone_model(model, tf.keras.Input([224, 224, 3]))


def test_flops_are_those_of_resnet50(network):
    convs = step_bound.convolutions(network, "float32")
    assert len(convs) == 53 and [conv.first for conv in convs].count(True) == 1
    forward = sum(conv.flops(1) for conv in convs) + 2 * 2048 * 1000
    assert forward / 2e9 == pytest.approx(4.09, abs=0.01)  # multiply-adds, as usually stated for stride 2 in the 3x3


def test_bfloat16_halves_the_bytes_of_all_but_the_classifier_and_the_update(network):
    wide, narrow = (step_bound.parts(network, 8, precision) for precision in ("float32", "bfloat16"))
    assert [part.flops for part in wide] == [part.flops for part in narrow]
    for one, other in zip(wide, narrow):
        assert one.bytes == (1 if one.name in ("classifier", "update") else 2) * other.bytes
    assert [part.name for part in wide][-4:] == ["classifier"] * 3 + ["update"]


def test_without_padding_only_the_flops_of_convolutions_fall(network):
    whole, unpadded = (step_bound.parts(network, 8, "float32", padding) for padding in (True, False))
    fewer = {one.name for one, other in zip(whole, unpadded) if other.flops < one.flops}
    assert fewer and all(name.startswith(("convolutions 3x3", "convolutions 7x7")) for name in fewer)
