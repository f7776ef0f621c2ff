"""Serialized examples are those of TensorFlow, byte by byte."""

import hypothesis
import hypothesis.strategies as st
import tensorflow as tf

from resnet_cpu.data.sources.serialization import serialize


def by_tensorflow(features):
    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    features = tf.train.Features(feature={name: feature(value) for name, value in features.items()})
    return tf.train.Example(features=features).SerializeToString(deterministic=True)


# Where one name begins with another, the order differs between releases of protobuf.
NAMES = [
    f"image/{name}" for name in ("encoded", "format", "height", "width", "class/label", "class/synset", "filename")
]


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    st.dictionaries(st.sampled_from(NAMES), st.binary(max_size=300) | st.integers(-(2**63), 2**63 - 1), min_size=1)
)
def test_the_bytes_are_those_of_tensorflow(features):
    assert serialize(features) == by_tensorflow(features)


def test_a_long_value_as_well():
    assert serialize({"image/encoded": b"x" * 100_000}) == by_tensorflow({"image/encoded": b"x" * 100_000})
