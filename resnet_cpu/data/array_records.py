"""Read ArrayRecord files, in which TFDS can store sets instead of TFRecords, through the package `array_record`."""

import importlib.util
from typing import Any

from resnet_cpu.errors import DataError

FORMAT = "array_record"  # as in TFDS' fileFormat, and the suffix of the files


def available() -> bool:
    """Return whether the package that reads such files is installed."""
    return importlib.util.find_spec("array_record") is not None


def open_reader(path: str) -> Any:
    """Return a reader of the file at `path`, whose `num_records()` is known; raise DataError if it is damaged."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        # Records are read one by one at random places, by one thread.
        reader = ArrayRecordReader(path, options="readahead_buffer_size:0,max_parallelism:0")
        reader.num_records()
        return reader
    except (RuntimeError, ValueError) as error:
        raise _damaged(path, error) from None


def read(reader: Any, path: str, record: int) -> bytes:
    """Return a record; raise DataError if its checksum does not match."""
    try:
        (payload,) = reader.read([record])
        return payload
    except (RuntimeError, ValueError, IndexError) as error:
        raise _damaged(f"{path}: record {record}", error) from None


def _damaged(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: damaged ({' '.join(str(error).split())[:200]}); copy or prepare the shard again")
