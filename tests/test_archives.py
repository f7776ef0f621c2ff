"""Members of tar archives by position: nothing is extracted, and nothing odd or incomplete is accepted."""

import gzip
import io
import tarfile

import pytest
from raw_images import tar

from resnet_cpu.data.sources import archives
from resnet_cpu.errors import DataError

FILES = {f"n01440764_{number}.JPEG": bytes([number]) * (300 * number + 1) for number in range(4)}


def listed(path):
    with open(path, "rb") as file:
        return list(archives.members(str(path), file))


def test_members_are_found_where_their_bytes_are(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar({"dir/" + name: content for name, content in FILES.items()}))
    whole = path.read_bytes()
    assert {one.name: whole[one.offset : one.offset + one.size] for one in listed(path)} == FILES


def test_an_archive_in_an_archive_is_read_in_place(tmp_path):
    path = tmp_path / "outer.tar"
    path.write_bytes(tar({"n00000001.tar": tar({"other": b"1"}), "n01440764.tar": tar(FILES)}))
    whole = path.read_bytes()
    with open(path, "rb") as file:
        outer = list(archives.members(str(path), file))
        inner = list(archives.members(str(path), file, outer[1].offset, outer[1].size, outer[1].name))
    assert {one.name: whole[one.offset : one.offset + one.size] for one in inner} == FILES


def odd(name="a.JPEG", kind=tarfile.REGTYPE, target=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (odd(kind=tarfile.SYMTYPE, target="/etc/passwd"), "a.JPEG is a link, a device or a sparse file"),
        (odd(kind=tarfile.LNKTYPE, target="b"), "is a link"),
        (odd(kind=tarfile.CHRTYPE), "a device"),
        (odd(kind=tarfile.FIFOTYPE), "a device"),
        (odd("../../a.JPEG"), "leads out of the archive"),
        (odd("/a.JPEG"), "leads out of the archive"),
        (gzip.compress(tar(FILES)), "compressed with gzip"),
        (b"", "not a complete tar archive"),
        (b"<html>" * 200, "not a complete tar archive"),
    ],
)
def test_odd_members_and_other_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        listed(path)


def test_a_truncated_archive_is_found_at_any_length(tmp_path):
    path, whole = tmp_path / "a.tar", tar(FILES)
    end = max(index for index, byte in enumerate(whole) if byte) // 512 * 512 + 512  # of the last member
    lengths = [*range(0, end + 512, 37), *range(0, end + 512, 512)]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="a.tar"):
            listed(path)
    path.write_bytes(whole[: end + 512])  # negative control: with one of the two blocks that mark the end
    assert len(listed(path)) == 4


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    """Python's tarfile ends quietly at a header that it cannot read: the members after it would be missing."""
    path, whole = tmp_path / "a.tar", bytearray(tar(FILES))
    second = 1024
    assert whole[second : second + 9] == b"n01440764"
    whole[second] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DataError, match="damaged at byte 1024, where a file should begin"):
        listed(path)
