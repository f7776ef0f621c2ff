"""TFRecord shards with random access: index, checksums, manifest.

A TFRecord is `length (uint64 LE), masked CRC32C of it, payload, masked CRC32C of that`. The index beside each shard
holds the offset of every payload, so any record takes one `pread`. The index is memory-mapped: the ranks of a host
share its pages, and the memory of a rank does not grow with the data set.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import resource
import stat
import struct
import sys
import time
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Set, Tuple

import google_crc32c
import numpy as np

from resnet_cpu import faults
from resnet_cpu.data import array_records, kinds
from resnet_cpu.data.datasets import MANIFEST
from resnet_cpu.errors import DataError, OutputError
from resnet_cpu.run.atomic import naming, open_atomically, write_atomically

FORMAT_VERSION = 1  # of the manifest; one without the key has this version as well
UNFINISHED = ".prepare"  # folder beside the shards while they are prepared
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
    Raises DataError for a shard that is truncated or damaged, or for another kind of file.
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
                raise _not_a_record(path, record, "truncated in its header")
            length, crc = _HEADER.unpack(header)
            if _masked_crc(header[:8]) != crc:
                raise _not_a_record(path, record, "damaged length field")
            end = position + _HEADER.size + length + _FOOTER.size
            if end > size:
                raise DataError(f"{path}: record {record}: truncated, {end - size} bytes missing; copy the shard again")
            starts.append(position + _HEADER.size)
            position = end
    return np.array([*starts, size + _HEADER.size], np.int64)


def _not_a_record(path: str, record: int, fault: str) -> DataError:
    kind = kinds.not_a_shard(path) if record == 0 else None
    return DataError(f"{path}: {kind or f'record {record}: {fault}; copy or prepare the shard again'}")


def write_index(path: str) -> int:
    """Scan the shard at `path`, write its index atomically and return its number of records."""
    starts = scan(path)
    buffer = io.BytesIO()
    np.save(buffer, starts)
    write_atomically(index_path(path), buffer.getvalue())
    with contextlib.suppress(OSError):  # whoever may read a shard may read its index, whatever the umask is
        os.chmod(index_path(path), stat.S_IMODE(os.stat(path).st_mode))
    return len(starts) - 1


def read_index(path: str) -> np.ndarray:
    """Return the index of the shard at `path`, see `scan`, memory-mapped if there is an index file."""
    try:
        starts = np.asarray(np.load(index_path(path), mmap_mode="r", allow_pickle=False))
        if starts.ndim != 1 or starts.dtype != np.int64 or not len(starts):
            raise ValueError(f"{starts.dtype} {starts.shape}")
    except (FileNotFoundError, PermissionError):
        return scan(path)  # the folder is read-only, or on another host than that of rank 0, which writes indexes
    except OSError:
        raise
    except Exception as error:  # NumPy's parser of a damaged header raises errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{index_path(path)}: unreadable index ({reason}); remove the file, it is written again at the next start"
        ) from None
    return starts


def _check_index(path: str, starts: np.ndarray) -> None:
    """Raise DataError with the true cause if `starts` is not the index of the shard at `path`, which is scanned."""
    found = scan(path)
    records, indexed = len(found) - 1, len(starts) - 1
    if np.array_equal(found, starts):
        return
    index = index_path(path)
    if not os.path.exists(index):
        raise DataError(f"{path}: changed since it was opened; run again once it has been written to its end")
    if records < indexed and np.array_equal(found, starts[: records + 1]):
        raise DataError(
            f"{path}: ends after {records} whole records, its index {index} has {indexed}: truncated at the border of "
            "a record; copy or prepare the shard again"
        )
    raise DataError(
        f"{path}: the shard can be read, with {records} records, but its index {index} ({indexed} records) is damaged "
        "or belongs to another shard; remove the index, it is written again at the next start"
    )


def write_split(folder: str, split: str, examples: Iterator[bytes], count: int, shards: int) -> List[Dict]:
    """Write `count` serialized examples to `shards` shards with their indexes; return the rows of the manifest."""
    bounds = np.linspace(0, count, shards + 1).astype(int)
    return [
        write_shard(os.path.join(folder, shard_name(split, shard, shards)), itertools.islice(examples, last - first))
        for shard, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist()))
    ]


def write_shard(path: str, payloads: Iterable[bytes]) -> Dict[str, Any]:
    """Write a shard atomically, then its index; return its row of the manifest: name, examples, bytes, sha256."""
    digest = hashlib.sha256()
    with open_atomically(path) as file:
        for payload in _named(payloads):
            header, footer = frame_around(payload)
            for part in (header, payload, footer):
                file.write(part)
                digest.update(part)
        faults.point("prepare:shard")
    faults.point("prepare:index")
    size = os.path.getsize(path)
    return {"name": os.path.basename(path), "examples": write_index(path), "bytes": size, "sha256": digest.hexdigest()}


def _named(payloads: Iterable[bytes]) -> Iterator[bytes]:
    """Yield `payloads`; an error of reading them is not one of the shard that is written."""
    with naming("the raw data"):
        yield from payloads


def write_manifest(folder: str, manifest: Dict) -> None:
    """Write the manifest, last: a folder without a manifest does not hold a data set yet."""
    content = {"format_version": FORMAT_VERSION, **manifest}
    faults.point("prepare:manifest")
    write_atomically(os.path.join(folder, MANIFEST), (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: str) -> Dict:
    """Return the manifest of a prepared data set; raise DataError with the remedy if it cannot be read."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        if manifest.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
            raise DataError(
                f"{path}: has format {manifest['format_version']}, this version of resnet_cpu reads {FORMAT_VERSION}; "
                "use a newer version, or prepare the data set again"
            )
        _check_rows(path, manifest["splits"])
        return manifest
    except FileNotFoundError:
        raise DataError(
            f"--data_dir={folder}: contains no {MANIFEST}; prepare the data set with python -m resnet_cpu.prepare"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{path}: not readable as JSON ({error}); copy it again, or remove it and repeat the prepare command"
        ) from None
    except (KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path}: not the manifest of a data set; copy it again, or remove it and repeat the prepare command"
        ) from None


def _check_rows(path: str, splits: Mapping[str, List[Dict]]) -> None:
    """Raise DataError for a shard that a manifest lists twice or outside of its folder, KeyError for missing keys."""
    listed: Set[str] = set()
    for rows in splits.values():
        for row in rows:
            name, _ = os.path.normpath(row["name"]), (row["examples"] + 0, row["bytes"] + 0)
            if os.path.isabs(name) or name.split(os.sep)[0] in (os.pardir, os.curdir):
                raise DataError(
                    f"{path}: lists '{row['name']}', which is not a file below its folder; prepare the data set again"
                )
            if name in listed:
                raise DataError(f"{path}: lists {name} twice; prepare the data set again")
            listed.add(name)


@dataclasses.dataclass(frozen=True)
class Split:
    """The shards of one split, open for random reads by example id (0 ... examples - 1)."""

    paths: Tuple[str, ...]
    first: np.ndarray  # id of the first example of each shard, and one past the last
    starts: Tuple[np.ndarray, ...]  # indexes of the shards, see `scan`
    descriptors: Tuple[int, ...]
    bad: Dict[int, DataError] = dataclasses.field(default_factory=dict, compare=False)  # examples that are skipped
    readers: Tuple[Any, ...] = ()  # of ArrayRecord files, which have neither indexes nor descriptors here
    checksums: Tuple[str, ...] = ()  # SHA-256 of the shards, as far as the description of the data set has them

    @functools.cached_property
    def content(self) -> str:
        """Return a digest of what is known of the shards without reading records, whatever their names and folder.

        These are the numbers, sizes and recorded SHA-256 of shards and the lengths of records, in their order. Runs
        record it: if it is computed otherwise, they cannot be resumed.
        """
        found = hashlib.sha256(repr((self.first.tolist(), self.checksums)).encode())
        for path in self.paths:
            found.update(b"%d\n" % os.path.getsize(path))
        for starts in self.starts:
            found.update(starts.tobytes())
        return found.hexdigest()[:16]

    @property
    def examples(self) -> int:
        return int(self.first[-1])

    def locate(self, example: int) -> Tuple[str, int]:
        """Return (path of the shard, record within it) of an example."""
        shard = int(np.searchsorted(self.first, example, side="right")) - 1
        return self.paths[shard], int(example - self.first[shard])

    def read(self, ids: np.ndarray) -> List[bytes]:
        """Return the payloads of the examples `ids`, with their checksums verified.

        A read that fails or comes back short is tried once more; then OutputError names file and record. A record
        that is not what index and checksums say is a DataError, with the cause that a scan of the shard shows.
        """
        shards = np.searchsorted(self.first, ids, side="right") - 1
        payloads = []
        for example, shard, within in zip(ids, shards.tolist(), (ids - self.first[shards]).tolist()):
            if self.readers:
                payloads.append(array_records.read(self.readers[shard], self.paths[shard], within))
                continue
            starts = self.starts[shard]
            start, following = starts[within : within + 2].tolist()
            length, offset = following - start, start - _HEADER.size
            if offset < 0 or length < _HEADER.size + _FOOTER.size or following > starts[-1]:
                raise self._cause(example)
            try:
                record = os.pread(self.descriptors[shard], length, offset)
            except OSError as error:
                record = self._read_again(shard, within, length, offset, error.strerror or str(error))
            if len(record) < length:
                record = self._read_again(shard, within, length, offset, f"{len(record)} of {length} bytes")
            payload = record[_HEADER.size : -_FOOTER.size]
            if frame_around(payload) != (record[: _HEADER.size], record[-_FOOTER.size :]):
                raise self._cause(example)
            payloads.append(payload)
        return payloads

    def _cause(self, example: int) -> DataError:
        """Return why an example is not what index and checksums say, after a scan of its shard."""
        path, record = self.locate(example)
        try:
            _check_index(path, self.starts[self.paths.index(path)])
        except DataError as cause:
            return cause
        return DataError(f"{path}: record {record}: checksum does not match; copy or prepare the shard again")

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
        for reader in self.readers:
            reader.close()


#: A split without examples, for a data set that lacks training or evaluation.
NO_SPLIT = Split((), np.zeros([1], np.int64), (), ())


def open_split(folder: str, manifest: Dict, split: str, empty: bool = False) -> Split:
    """Open the shards of `split` and check sizes and counts against manifest and indexes; no payload is read.

    A split without any example is an error unless `empty`.
    """
    rows = manifest["splits"].get(split, [])
    paths = [os.path.join(folder, row["name"]) for row in rows]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise DataError(
            f"{missing[0]}: shard missing, {len(missing)} of {len(rows)} that the description of the data set lists "
            f"for '{split}'; copy or prepare the data set again"
        )
    _allow_open_files(2 * len(rows))  # a mapped file keeps its descriptor as well
    readers, starts = [], []
    if manifest.get("file_format") == array_records.FORMAT:
        readers = [array_records.open_reader(path) for path in paths]
        counts = [reader.num_records() for reader in readers]
        for path, count, row in zip(paths, counts, rows):
            if count != row["examples"]:
                raise DataError(
                    f"{path}: {count} records, but the data set's description says {row['examples']}; copy or prepare "
                    "the shard again"
                )
    else:
        starts = [_checked_index(path, row) for path, row in zip(paths, rows)]
        counts = [len(index) - 1 for index in starts]
    if not (empty or sum(counts)):
        raise DataError(f"{folder}: no examples in split '{split}'; prepare the data set again")
    return Split(
        tuple(paths),
        np.cumsum([0, *counts]),
        tuple(starts),
        () if readers else tuple(os.open(path, os.O_RDONLY) for path in paths),
        readers=tuple(readers),
        checksums=tuple(str(row["sha256"]) for row in rows if row.get("sha256")),
    )


def _checked_index(path: str, row: Mapping) -> np.ndarray:
    """Return the index of the shard at `path`; raise DataError with the cause if shard, index and `row` differ."""
    if os.path.isdir(path):
        raise DataError(f"{path}: a folder, not a shard; copy or prepare the data set again")
    size = os.path.getsize(path)
    if not size and row.get("examples") != 0:
        raise DataError(f"{path}: an empty file; copy or prepare the shard again")
    starts = read_index(path)
    described = row.get("examples"), row.get("bytes", size)
    if size == int(starts[-1]) - _HEADER.size and described in ((len(starts) - 1, size), (None, size)):
        return starts
    records = len(scan(path)) - 1  # says what is wrong with a damaged shard
    if described not in ((records, size), (None, size)):
        raise DataError(
            f"{path}: {records} records in {size} bytes, but the data set's description says {described[0]} in "
            f"{described[1]}: truncated or replaced; copy or prepare the shard again"
        )
    _check_index(path, starts)
    raise DataError(f"{path}: changed while it was opened; run again once it has been written to its end")


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
