"""TFRecord shards with random access: index, checksums, manifest.

A TFRecord is `length (uint64 LE), masked CRC32C of it, payload, masked CRC32C of that`. The index beside each shard
holds the offset of every payload, so any record takes one `pread`. The index is memory-mapped: the ranks of a host
share its pages, and the memory of a rank does not grow with the data set.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import resource
import struct
import sys
import time
from typing import Any, Dict, Iterable, Iterator, List, Tuple

import google_crc32c
import numpy as np

from resnet_cpu.data.datasets import MANIFEST
from resnet_cpu.errors import DataError, OutputError
from resnet_cpu.run.atomic import write_atomically

RETRY_AFTER_S = 1.0  # after a read that failed: most failures of network file systems are brief
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame_around(payload: bytes) -> Tuple[bytes, bytes]:
    """Return (header, footer) of the TFRecord that holds `payload`."""
    length = struct.pack("<Q", len(payload))
    return length + _FOOTER.pack(_masked_crc(length)), _FOOTER.pack(_masked_crc(payload))


def shard_name(split: str, shard: int, shards: int) -> str:
    """Return the usual file name, as in train-00000-of-01024."""
    return f"{split}-{shard:05d}-of-{shards:05d}"


def index_path(path: str) -> str:
    """Return the path of the index of the shard at `path`."""
    return path + ".index.npy"


def scan(path: str) -> np.ndarray:
    """Read the record headers of a shard and return its index, int64 [records + 1].

    Entry i is the offset of record i's payload; the last entry is where the payload of a further record would start.
    """
    starts: List[int] = []
    size = os.path.getsize(path)
    position = 0
    with open(path, "rb") as shard:
        while position < size:
            shard.seek(position)
            header = shard.read(_HEADER.size)
            record = len(starts)
            if len(header) < _HEADER.size:
                raise DataError(f"{path}: record {record}: truncated in its header; copy or prepare the shard again")
            length, crc = _HEADER.unpack(header)
            if _masked_crc(header[:8]) != crc:
                raise DataError(f"{path}: record {record}: damaged length field; copy or prepare the shard again")
            end = position + _HEADER.size + length + _FOOTER.size
            if end > size:
                raise DataError(f"{path}: record {record}: truncated, {end - size} bytes missing; copy the shard again")
            starts.append(position + _HEADER.size)
            position = end
    return np.array([*starts, size + _HEADER.size], np.int64)


def write_index(path: str) -> int:
    """Scan the shard at `path`, write its index atomically and return its number of records."""
    starts = scan(path)
    buffer = io.BytesIO()
    np.save(buffer, starts)
    write_atomically(index_path(path), buffer.getvalue())
    return len(starts) - 1


def read_index(path: str) -> np.ndarray:
    """Return the index of the shard at `path`, see `scan`, memory-mapped if there is an index file."""
    try:
        starts = np.asarray(np.load(index_path(path), mmap_mode="r", allow_pickle=False))
        if starts.ndim != 1 or starts.dtype != np.int64 or not len(starts):
            raise ValueError(f"{starts.dtype} {starts.shape}")
    except FileNotFoundError:
        return scan(path)  # the folder is read-only, else `folders.make_indexes` has written one
    except (ValueError, EOFError) as error:
        raise DataError(f"{index_path(path)}: unreadable index ({error}); remove it and prepare again") from None
    size, indexed = os.path.getsize(path), int(starts[-1]) - _HEADER.size
    if size != indexed:
        raise DataError(
            f"{path}: {size} bytes, but its index was made for {indexed} ({len(starts) - 1} records): truncated or "
            "replaced; copy or prepare the shard again"
        )
    return starts


def write_split(folder: str, split: str, examples: Iterator[bytes], count: int, shards: int) -> List[Dict]:
    """Write `count` serialized examples to `shards` shards with their indexes; return the rows of the manifest."""
    bounds = np.linspace(0, count, shards + 1).astype(int)
    return [
        write_shard(os.path.join(folder, shard_name(split, shard, shards)), itertools.islice(examples, last - first))
        for shard, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist()))
    ]


def write_shard(path: str, payloads: Iterable[bytes]) -> Dict[str, Any]:
    """Write a shard atomically, then its index; return its row of the manifest: name, examples, bytes, sha256."""
    temporary, digest = f"{path}.tmp{os.getpid()}", hashlib.sha256()
    with open(temporary, "wb") as file:
        for payload in payloads:
            header, footer = frame_around(payload)
            for part in (header, payload, footer):
                file.write(part)
                digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    size = os.path.getsize(path)
    return {"name": os.path.basename(path), "examples": write_index(path), "bytes": size, "sha256": digest.hexdigest()}


def write_manifest(folder: str, manifest: Dict) -> None:
    """Write the manifest, last: a folder without a manifest does not hold a data set yet."""
    write_atomically(os.path.join(folder, MANIFEST), (json.dumps(manifest, indent=1) + "\n").encode())


def read_manifest(folder: str) -> Dict:
    """Return the manifest of a prepared data set; raise DataError with the remedy if it cannot be read."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        for rows in manifest["splits"].values():
            for row in rows:
                _ = row["name"], row["examples"], row["bytes"]  # every shard is described, or KeyError
        return manifest
    except FileNotFoundError:
        raise DataError(
            f"--data_dir={folder}: contains no {MANIFEST}; prepare the data set with python -m resnet_cpu.prepare"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}); prepare the data set again") from None
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not the manifest of a data set; prepare the data set again") from None


@dataclasses.dataclass(frozen=True)
class Split:
    """The shards of one split, open for random reads by example id (0 ... examples - 1)."""

    paths: Tuple[str, ...]
    first: np.ndarray  # id of the first example of each shard, and one past the last
    starts: Tuple[np.ndarray, ...]  # indexes of the shards, see `scan`
    descriptors: Tuple[int, ...]
    bad: Dict[int, DataError] = dataclasses.field(default_factory=dict, compare=False)  # examples that are skipped

    @property
    def examples(self) -> int:
        return int(self.first[-1])

    def locate(self, example: int) -> Tuple[str, int]:
        """Return (path of the shard, record within it) of an example."""
        shard = int(np.searchsorted(self.first, example, side="right")) - 1
        return self.paths[shard], int(example - self.first[shard])

    def read(self, ids: np.ndarray) -> List[bytes]:
        """Return the payloads of the examples `ids`, with their checksums verified.

        A read that fails or comes back short is tried once more; then OutputError names file and record. A wrong
        checksum is a DataError.
        """
        shards = np.searchsorted(self.first, ids, side="right") - 1
        payloads = []
        for example, shard, within in zip(ids, shards.tolist(), (ids - self.first[shards]).tolist()):
            start, following = self.starts[shard][within : within + 2].tolist()
            length, offset = following - start, start - _HEADER.size
            try:
                record = os.pread(self.descriptors[shard], length, offset)
            except OSError as error:
                record = self._read_again(shard, within, length, offset, error.strerror or str(error))
            if len(record) < length:
                record = self._read_again(shard, within, length, offset, f"{len(record)} of {length} bytes")
            payload = record[_HEADER.size : -_FOOTER.size]
            if frame_around(payload) != (record[: _HEADER.size], record[-_FOOTER.size :]):
                path, number = self.locate(example)
                raise DataError(f"{path}: record {number}: checksum does not match; copy or prepare the shard again")
            payloads.append(payload)
        return payloads

    def _read_again(self, shard: int, within: int, length: int, offset: int, failure: str) -> bytes:
        """Read a record through a new descriptor, since the old one may be stale; raise OutputError if that fails."""
        path = self.paths[shard]
        print(f"WARNING: {path}: record {within}: read failed ({failure}); trying again", file=sys.stderr, flush=True)
        time.sleep(RETRY_AFTER_S)
        try:
            with open(path, "rb", buffering=0) as file:
                record = os.pread(file.fileno(), length, offset)
                os.dup2(file.fileno(), self.descriptors[shard], inheritable=False)  # later reads use the new one
        except OSError as error:
            record, failure = b"", error.strerror or str(error)
        if len(record) < length:
            raise OutputError(
                f"{path}: record {within}: read failed twice ({failure}); check the file system, then run again"
            )
        return record

    def close(self) -> None:
        """Close the files of the split."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def open_split(folder: str, manifest: Dict, split: str) -> Split:
    """Open the shards of `split` and check sizes and counts against manifest and indexes; no payload is read."""
    rows = manifest["splits"].get(split, [])
    _allow_open_files(2 * len(rows))  # a mapped file keeps its descriptor as well
    paths, counts, starts = [], [0], []
    for row in rows:
        path = os.path.join(folder, row["name"])
        if not os.path.exists(path):
            raise DataError(f"{path}: shard missing that the manifest lists; copy or prepare the data set again")
        index = read_index(path)
        records, size = len(index) - 1, os.path.getsize(path)
        if (records, size) != (row.get("examples", records), row.get("bytes", size)):
            raise DataError(
                f"{path}: {records} records in {size} bytes, but the data set's description says "
                f"{row.get('examples')} in {row.get('bytes', size)}; copy or prepare the shard again"
            )
        paths.append(path)
        counts.append(records)
        starts.append(index)
    if not sum(counts):
        raise DataError(f"{folder}: no examples in split '{split}'; prepare the data set again")
    return Split(
        tuple(paths),
        np.cumsum(counts),
        tuple(starts),
        tuple(os.open(path, os.O_RDONLY) for path in paths),
    )


def _allow_open_files(more: int) -> None:
    """Increase the soft limit of open files so that `more` fit; raise DataError if the hard limit is too low.

    The soft limit is usually 1,024, while ImageNet in its usual layout has 1,152 shards.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + more + 256  # TensorFlow and MPI open more files later
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise DataError(f"the shards need {wanted} open files, the limit is {hard}; increase it (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
