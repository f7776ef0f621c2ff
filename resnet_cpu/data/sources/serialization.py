"""Serialized tf.train.Example messages without TensorFlow, so that a process that writes shards starts in a moment.

The bytes are those of `tf.train.Example.SerializeToString(deterministic=True)` if no name begins with another; a test
compares them.
"""

from typing import Dict, Union

Value = Union[int, bytes]


def _varint(number: int) -> bytes:
    number &= 2**64 - 1  # negative numbers as two's complement
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _message(field: int, content: bytes) -> bytes:
    """Return a field of length-delimited type (wire type 2)."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _feature(value: Value) -> bytes:
    if isinstance(value, bytes):
        return _message(1, _message(1, value))  # Feature.bytes_list, BytesList.value
    return _message(3, _message(1, _varint(value)))  # Feature.int64_list, Int64List.value (packed)


def serialize(features: Dict[str, Value]) -> bytes:
    """Return the serialized example with one value per feature, in the order of their names."""
    entries = b"".join(
        _message(1, _message(1, name.encode()) + _message(2, _feature(value)))
        for name, value in sorted(features.items())
    )
    return _message(1, entries)
