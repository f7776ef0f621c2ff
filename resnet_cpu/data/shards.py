"""TFRecord shards read at random: index, checksums, manifest.

A TFRecord is `length (uint64 LE), masked CRC32C of it, payload, masked CRC32C of that`. The index beside each shard
holds where every payload starts and how long it is, so any record is one `pread` away.
"""

import dataclasses
import io
import json
import os
import struct
from typing import Dict, Iterator, List, Tuple

import google_crc32c
import numpy as np

from resnet_cpu.errors import DataError

MANIFEST = "manifest.json"
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame_around(payload: bytes) -> Tuple[bytes, bytes]:
    """Return the (header, footer) that make `payload` a TFRecord."""
    length = struct.pack("<Q", len(payload))
    return length + _FOOTER.pack(_masked_crc(length)), _FOOTER.pack(_masked_crc(payload))


def shard_name(split: str, shard: int, shards: int) -> str:
    """Return the customary file name, as in train-00000-of-01024."""
    return f"{split}-{shard:05d}-of-{shards:05d}"


def index_path(path: str) -> str:
    """Return where the index of the shard at `path` lies."""
    return path + ".index.npz"


def scan(path: str) -> Tuple[np.ndarray, np.ndarray]:
    """Walk the record headers of a shard; return (payload offsets, payload lengths), int64 [records] each."""
    offsets: List[int] = []
    lengths: List[int] = []
    size = os.path.getsize(path)
    position = 0
    with open(path, "rb") as shard:
        while position < size:
            shard.seek(position)
            header = shard.read(_HEADER.size)
            record = len(offsets)
            if len(header) < _HEADER.size:
                raise DataError(f"{path}: record {record}: cut off in its header; copy or prepare the shard again")
            length, crc = _HEADER.unpack(header)
            if _masked_crc(header[:8]) != crc:
                raise DataError(f"{path}: record {record}: damaged length field; copy or prepare the shard again")
            end = position + _HEADER.size + length + _FOOTER.size
            if end > size:
                raise DataError(f"{path}: record {record}: cut off, {end - size} bytes missing; copy the shard again")
            offsets.append(position + _HEADER.size)
            lengths.append(length)
            position = end
    return np.array(offsets, np.int64), np.array(lengths, np.int64)


def write_index(path: str) -> int:
    """Scan the shard at `path`, put its index beside it atomically and return its number of records."""
    offsets, lengths = scan(path)
    buffer = io.BytesIO()
    np.savez(buffer, offsets=offsets, lengths=lengths, bytes=np.int64(os.path.getsize(path)))
    write_atomically(index_path(path), buffer.getvalue())
    return len(offsets)


def read_index(path: str) -> Tuple[np.ndarray, np.ndarray]:
    """Return (payload offsets, payload lengths) of the shard at `path`, from its index if there is one."""
    try:
        with np.load(index_path(path), allow_pickle=False) as index:
            offsets, lengths, indexed = index["offsets"], index["lengths"], int(index["bytes"])
    except FileNotFoundError:
        return scan(path)  # of a folder that cannot be written, else `layouts.make_indexes` has made one
    except Exception as error:  # a damaged zip raises many kinds
        raise DataError(f"{index_path(path)}: unreadable index ({error}); remove it and prepare again") from None
    size = os.path.getsize(path)
    if size != indexed:
        raise DataError(
            f"{path}: {size} bytes, but its index was made for {indexed} ({len(offsets)} records): truncated or "
            "replaced; copy or prepare the shard again"
        )
    return offsets, lengths


def write_atomically(path: str, content: bytes) -> None:
    """Write a file that is either absent, old or complete, also after a power loss."""
    temporary = f"{path}.tmp{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_split(folder: str, split: str, examples: Iterator[bytes], count: int, shards: int) -> List[Dict]:
    """Write `count` serialized examples over `shards` shards with their indexes; return the manifest's rows."""
    rows = []
    bounds = np.linspace(0, count, shards + 1).astype(int)
    for shard, (first, last) in enumerate(zip(bounds[:-1], bounds[1:])):
        name = shard_name(split, shard, shards)
        path = os.path.join(folder, name)
        with open(path + ".tmp", "wb") as file:
            for _ in range(last - first):
                payload = next(examples)
                header, footer = frame_around(payload)
                file.write(header + payload + footer)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
        rows.append({"name": name, "examples": write_index(path), "bytes": os.path.getsize(path)})
    return rows


def write_manifest(folder: str, manifest: Dict) -> None:
    """Publish the data set: a folder without a manifest is not yet one."""
    write_atomically(os.path.join(folder, MANIFEST), (json.dumps(manifest, indent=1) + "\n").encode())


def read_manifest(folder: str) -> Dict:
    """Return the manifest of a prepared data set, or raise DataError that says how to prepare one."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.isdir(folder):
        raise DataError(f"--data_dir={folder}: no such folder; make it with python -m resnet_cpu.prepare")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        for rows in manifest["splits"].values():
            for row in rows:
                _ = row["name"], row["examples"], row["bytes"]  # every shard is described, or KeyError
        return manifest
    except FileNotFoundError:
        raise DataError(
            f"--data_dir={folder}: no {MANIFEST} in it, so no data set prepared by python -m resnet_cpu.prepare"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); prepare the data set again") from None
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: is no manifest of a data set; prepare the data set again") from None


@dataclasses.dataclass(frozen=True)
class Split:
    """The shards of one split, opened for random reads by example id (0 ... examples - 1)."""

    paths: Tuple[str, ...]
    first: np.ndarray  # id of the first example of each shard, and one past the last
    offsets: np.ndarray  # of each example's payload in its shard
    lengths: np.ndarray
    descriptors: Tuple[int, ...]

    @property
    def examples(self) -> int:
        return int(self.first[-1])

    def locate(self, example: int) -> Tuple[str, int]:
        """Return (path of the shard, record within it) of an example."""
        shard = int(np.searchsorted(self.first, example, side="right")) - 1
        return self.paths[shard], int(example - self.first[shard])

    def read(self, ids: np.ndarray) -> List[bytes]:
        """Return the payloads of the examples `ids`, their checksums verified; one call a batch."""
        shards = np.searchsorted(self.first, ids, side="right") - 1
        payloads = []
        for example, shard, offset, length in zip(
            ids, shards.tolist(), self.offsets[ids].tolist(), self.lengths[ids].tolist()
        ):
            record = os.pread(self.descriptors[shard], _HEADER.size + length + _FOOTER.size, offset - _HEADER.size)
            payload = record[_HEADER.size : -_FOOTER.size]
            if frame_around(payload) != (record[: _HEADER.size], record[-_FOOTER.size :]) or len(payload) != length:
                path, number = self.locate(example)
                raise DataError(f"{path}: record {number}: checksum does not match; copy or prepare the shard again")
            payloads.append(payload)
        return payloads

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


def open_split(folder: str, manifest: Dict, split: str) -> Split:
    """Open the shards of `split`, checking sizes and counts against manifest and indexes (no payload is read)."""
    rows = manifest["splits"].get(split, [])
    paths, counts, offsets, lengths = [], [0], [], []
    for row in rows:
        path = os.path.join(folder, row["name"])
        if not os.path.exists(path):
            raise DataError(f"{path}: shard missing, the manifest lists it; copy or prepare the data set again")
        shard_offsets, shard_lengths = read_index(path)
        size = os.path.getsize(path)
        if (len(shard_offsets), size) != (row.get("examples", len(shard_offsets)), row.get("bytes", size)):
            raise DataError(
                f"{path}: {len(shard_offsets)} records in {size} bytes, the data set's description says "
                f"{row.get('examples')} in {row.get('bytes', size)}; copy or prepare the shard again"
            )
        paths.append(path)
        counts.append(len(shard_offsets))
        offsets.append(shard_offsets)
        lengths.append(shard_lengths)
    if not sum(counts):
        raise DataError(f"{folder}: no examples in split '{split}'; prepare the data set again")
    return Split(
        tuple(paths),
        np.cumsum(counts),
        np.concatenate(offsets),
        np.concatenate(lengths),
        tuple(os.open(path, os.O_RDONLY) for path in paths),
    )
