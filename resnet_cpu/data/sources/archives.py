"""Members of tar archives by position, so that each can be read on its own. Nothing is ever extracted."""

import io
import os
import tarfile
from typing import BinaryIO, Iterator, NamedTuple

from resnet_cpu.errors import DataError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str  # base name
    offset: int  # of its content in the outermost file, bytes
    size: int


class _Part(io.RawIOBase):
    """A range of a file, as a file that can only be read: an archive within an archive."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + position
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._position, 0)
        wanted = left if size < 0 else min(size, left)
        content = os.pread(self._file.fileno(), wanted, self._offset + self._position)
        self._position += len(content)
        return content


def members(path: str, file: BinaryIO, offset: int = 0, size: int = -1, within: str = "") -> Iterator[Member]:
    """Yield the regular files of the archive at `path`, or of the archive that is its member `within`.

    Raises DataError for an archive that is compressed, truncated or damaged, and for members that no archive of images
    has: links, devices, sparse files, absolute paths and paths through `..`.
    """
    where = f"{path}: {within}" if within else path
    size = os.fstat(file.fileno()).st_size if size < 0 else size
    start = os.pread(file.fileno(), 2, offset)
    if start in _COMPRESSED:
        raise DataError(f"{where}: compressed with {_COMPRESSED[start]}; decompress it first, images do not compress")
    try:
        with tarfile.open(fileobj=_Part(file, offset, size), mode="r:") as archive:  # type: ignore[call-overload]
            while True:
                member = archive.next()
                if member is None:
                    break
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them
                if member.isdir():
                    continue
                _check(where, member)
                if member.offset_data + member.size > size:
                    missing = member.offset_data + member.size - size
                    raise DataError(f"{where}: truncated in {member.name}, {missing} bytes missing; download it again")
                yield Member(os.path.basename(member.name), offset + member.offset_data, member.size)
            _check_end(where, file, offset + archive.offset, offset + size)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{where}: not a complete tar archive ({error}); download it again") from None


def _check(where: str, member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.issparse():
        raise DataError(f"{where}: {member.name} is a link, a device or a sparse file; an archive of images has none")
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts:
        raise DataError(f"{where}: {member.name}: a path that leads out of the archive; download the archive again")


def _check_end(where: str, file: BinaryIO, position: int, end: int) -> None:
    """Raise DataError unless a block of zeros, the mark of the end, stands where the last member ends."""
    if os.pread(file.fileno(), min(512, max(end - position, 0)), position).strip(b"\0"):
        raise DataError(f"{where}: damaged at byte {position}, where a file should begin; download it again")
    if end - position < 512:
        raise DataError(f"{where}: truncated: its end is missing; download it again")
