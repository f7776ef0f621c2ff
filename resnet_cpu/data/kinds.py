"""Recognise, by their first bytes, files that are not TFRecord shards: compressed ones, web pages, pointers, images."""

import shlex
import zlib
from typing import Optional

_LOOK = 512  # bytes
_LEAST = 12  # bytes; fewer may be the beginning of any record
# First bytes -> (name, program that decompresses standard input).
_COMPRESSED = {
    b"\x1f\x8b\x08": ("GZIP", "gzip -dc"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -dc"),
    b"\x04\x22\x4d\x18": ("LZ4", "lz4 -dc"),
    b"\xfd7zXZ\x00": ("XZ", "xz -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
}
_ZLIB_PROGRAM = 'python -c "import sys,zlib; sys.stdout.buffer.write(zlib.decompress(sys.stdin.buffer.read()))"'
# First bytes -> what the file is, and the remedy.
_OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch the file with git lfs pull",
    b"\x83\xaf\x70\xd1": "an ArrayRecord or Riegeli file; prepare the data set with file_format=tfrecord",
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"\xff\xd8\xff": "a JPEG image; convert images to shards first",
    b"\x89PNG": "a PNG image; convert images to shards first",
    b"\x89HDF": "an HDF5 file; convert it to shards first",
}


def not_a_shard(path: str) -> Optional[str]:
    """Return what the file at `path` is, with the remedy, if it is clearly not a TFRecord shard; else None.

    Only for files whose first record is not readable: the first bytes of a shard may be those of another kind.
    """
    with open(path, "rb") as file:
        head = file.read(_LOOK)
    if len(head) < _LEAST:
        return None
    for first, (name, program) in _COMPRESSED.items():
        if head.startswith(first):
            return _compressed(name, program, path)
    if _is_zlib(head):
        return _compressed("ZLIB", _ZLIB_PROGRAM, path)
    for first, text in _OTHERS.items():
        if head.startswith(first):
            return text
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page, as servers send in place of a file; download the shard again"
    if not head.strip(b"\0"):
        return "filled with zeros, as an interrupted copy leaves it; copy the shard again"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        line = head.decode("ascii").split("\n")[0][:40].strip()
        return f"a text file that begins with '{line}'; copy or prepare the shard again"
    return None


def _is_zlib(head: bytes) -> bool:
    """Return whether `head` begins a stream of zlib, which has no distinctive first bytes."""
    try:
        return bool(zlib.decompressobj().decompress(head)) and head[0] & 0x0F == 8
    except zlib.error:
        return False


def _compressed(name: str, program: str, path: str) -> str:
    old, new = shlex.quote(path), shlex.quote(path + ".new")
    return (
        f"{name}-compressed; records are read at random places, so shards must not be compressed: rewrite each with "
        f"{program} < {old} > {new} && mv {new} {old}"
    )
