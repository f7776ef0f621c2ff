"""A folder of raw ImageNet files: its images, its labels in all their forms, and what is missing."""

import tarfile

import numpy as np
import pytest
from raw_images import SYNSETS, imagenet, tar, write_labels

from resnet_cpu.data.sources.imagenet import find
from resnet_cpu.data.sources.listing import read_image
from resnet_cpu.errors import DataError


def contents(found):
    """Return {name: (synset, content)} of a listing."""
    return {
        name.decode(): (found.classes[label], read_image(found.files[file], int(offset), int(size)))
        for table in found.splits.values()
        for name, label, file, offset, size in zip(table.names, table.labels, table.files, table.offsets, table.sizes)
    }


@pytest.mark.parametrize("labels", ["synsets", "solution", "kit"])
def test_images_and_labels_are_found_in_every_form_of_the_labels(tmp_path, labels):
    made = imagenet(tmp_path, labels=labels)
    found = find(str(tmp_path), allow_incomplete=True)
    assert contents(found) == made
    assert (found.classes, found.label_base) == (tuple(SYNSETS[:10]), 1)
    assert [len(found.splits[split].names) for split in ("train", "validation")] == [30, 20]


def test_unpacked_archives_give_the_same_listing(tmp_path):
    imagenet(tmp_path / "tar")
    archives, unpacked = find(str(tmp_path / "tar"), True), tmp_path / "folders"
    with tarfile.open(tmp_path / "tar" / "ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(unpacked / "train" / member.name[:-4])
    labels = {}
    with tarfile.open(tmp_path / "tar" / "ILSVRC2012_img_val.tar") as outer:
        for name, (synset, content) in contents(archives).items():
            if name.startswith("ILSVRC2012_val"):
                labels[name] = synset
                (unpacked / "val" / synset).mkdir(parents=True, exist_ok=True)
                (unpacked / "val" / synset / name).write_bytes(content)
    assert contents(find(str(unpacked), True)) == contents(archives)
    assert find(str(unpacked), True).identity() == archives.identity()
    for path in (unpacked / "val").rglob("*.JPEG"):  # flat, with a file of labels
        path.rename(unpacked / "val" / path.name)
    for path in (unpacked / "val").iterdir():
        if path.is_dir():
            path.rmdir()
    write_labels(unpacked, [labels[name] for name in sorted(labels)], 10, "synsets")
    assert contents(find(str(unpacked), True)) == contents(archives)


def test_a_folder_of_the_archives_of_the_classes_is_read_as_well(tmp_path):
    imagenet(tmp_path)
    expected = contents(find(str(tmp_path), True))
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar") as outer:
        outer.extractall(tmp_path / "train")
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()
    assert contents(find(str(tmp_path), True)) == expected


def test_a_set_that_is_not_whole_is_refused_with_what_is_missing(tmp_path, capsys):
    imagenet(tmp_path)
    with pytest.raises(DataError) as refused:
        find(str(tmp_path), allow_incomplete=False)
    for part in (
        "10 classes where it has 1,000 (990 missing)",
        "30 training images where it has 1,281,167 (1,281,137 missing)",
        "20 validation images where it has 50,000",
        "--allow_incomplete",
    ):
        assert part in str(refused.value)
    find(str(tmp_path), allow_incomplete=True)
    assert "WARNING: " in capsys.readouterr().err


def refusal(folder):
    with pytest.raises(DataError) as refused:
        find(str(folder), allow_incomplete=False)
    return str(refused.value)


def test_unknown_files_labels_and_classes_are_named(tmp_path):
    imagenet(tmp_path)
    extra = {"README": b"text", f"{SYNSETS[0]}_1.JPEG": b""}
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar") as outer:
        outer.extractall(tmp_path / "train")
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()
    (tmp_path / "train" / "n99999999.tar").write_bytes(tar(extra))
    (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("n77777777\n" * 20)
    text = refusal(tmp_path)
    assert "1 files that are not training images: README" in text
    assert (
        f"1 training images that are empty, missing or larger than 33,554,432 bytes: {SYNSETS[0]}_1.JPEG (0 bytes)"
        in text
    )
    assert "1 validation labels without training images: n77777777" in text
    assert "10 classes that the validation labels do not name" in text


@pytest.mark.parametrize("labels", ["synsets", "kit"])
@pytest.mark.parametrize("count", [19, 21, 49_999, 50_001])
def test_labels_of_another_number_of_images_are_refused_whatever_is_allowed(labels, count, tmp_path):
    """One line is missing or too many, and it may be anywhere: then all labels after it are wrong."""
    imagenet(tmp_path)
    write_labels(tmp_path, [SYNSETS[number % 10] for number in range(count)], 10, labels)
    if labels == "kit":
        (tmp_path / "imagenet_2012_validation_synset_labels.txt").unlink()
    with pytest.raises(DataError, match=f"{count:,} labels, but validation images up to number 20: line N is the"):
        find(str(tmp_path), allow_incomplete=True)


def test_the_whole_list_of_labels_does_for_a_part_of_the_images(tmp_path):
    imagenet(tmp_path)
    write_labels(tmp_path, [SYNSETS[number % 10] for number in range(50_000)], 10, "synsets")
    assert len(find(str(tmp_path), allow_incomplete=True).splits["validation"].names) == 20


def test_images_that_a_table_of_labels_leaves_out_are_named(tmp_path):
    imagenet(tmp_path, labels="none")
    write_labels(tmp_path, [SYNSETS[number % 10] for number in range(19)], 10, "solution")
    assert "1 validation images without a label: ILSVRC2012_val_00000020.JPEG" in refusal(tmp_path)


def test_an_image_that_occurs_twice_is_named(tmp_path):
    imagenet(tmp_path)
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar") as outer:
        outer.extractall(tmp_path / "train")
    (tmp_path / "ILSVRC2012_img_train.tar").rename(tmp_path / "train" / "all.tar")
    with pytest.raises(DataError, match=f"train: two images have the name {SYNSETS[0]}_0.JPEG"):
        find(str(tmp_path), True)


def test_missing_files_are_named(tmp_path):
    assert "the folder does not exist" in refusal(tmp_path / "nowhere")
    assert "neither ILSVRC2012_img_train.tar nor" in refusal(tmp_path)
    imagenet(tmp_path, labels="none")
    assert "no labels of the validation images: put imagenet_2012_validation_synset_labels.txt" in refusal(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"")
    assert "unpack ILSVRC2012_devkit_t12.tar.gz there" in refusal(tmp_path)


def test_labels_that_cannot_be_read_are_named(tmp_path):
    imagenet(tmp_path, labels="kit without list")
    assert "needs the kit's list of synsets, one of synsets.txt" in refusal(tmp_path)
    (tmp_path / "synsets.txt").write_text("\n".join(SYNSETS[:3]))
    assert "is not the number of a class" in refusal(tmp_path)
    (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("65\n970\n")
    assert "'65' is not a synset" in refusal(tmp_path)


def test_matlab_lists_of_the_kit_are_read(tmp_path):
    io = pytest.importorskip("scipy.io")
    made = imagenet(tmp_path, labels="kit")
    rows = [line.split() for line in (tmp_path / "map_clsloc.txt").read_text().splitlines()]
    (tmp_path / "map_clsloc.txt").unlink()
    kind = np.dtype([("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    table = np.array([(int(number), synset, words) for synset, number, words in rows], kind)
    path = tmp_path / "ILSVRC2012_devkit_t12" / "data" / "meta.mat"
    io.savemat(path, {"synsets": table.reshape(-1, 1)})
    assert contents(find(str(tmp_path), True)) == made
    path.write_bytes(b"MATLAB")
    assert "not the kit's list of synsets" in refusal(tmp_path)
