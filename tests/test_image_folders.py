"""Trees of image files, and the layout of Tiny-ImageNet."""

import os

import pytest
from raw_images import encoded, folders

from resnet_cpu.data.sources.image_folders import find_folder, find_tiny_imagenet
from resnet_cpu.errors import DataError, FlagError


def names(found):
    return {split: [name.decode() for name in table.names] for split, table in found.splits.items()}


def test_a_tree_with_two_splits(tmp_path, capsys):
    root = folders(tmp_path)
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "train" / "cat" / "more").mkdir()
    (root / "train" / "cat" / "more" / "0.jpg").write_bytes(encoded())
    (root / "train" / ".cache").mkdir()
    found = find_folder(str(root), None, False)
    assert found.classes == ("cat", "dog", "eel") and found.label_base == 0
    assert len(names(found)["train"]) == 19 and "cat/more/0.jpg" in names(found)["train"]
    assert names(found)["validation"][:2] == ["cat/0.jpg", "cat/1.png"]
    assert "ignored 1 files that are not images" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_the_second_split_may_have_other_names(tmp_path, name):
    root = folders(tmp_path)
    (root / "validation").rename(root / name)
    assert len(names(find_folder(str(root), None, False))["validation"]) == 9


def test_one_tree_is_split_by_a_hash_that_adding_images_does_not_change(tmp_path):
    root = folders(tmp_path, train=40) / "train"
    before = names(find_folder(str(root), 0.25, False))
    assert 15 < len(before["validation"]) < 45 and not set(before["train"]) & set(before["validation"])
    for number in range(40, 60):
        (root / "cat" / f"{number}.jpg").write_bytes(encoded())
    after = names(find_folder(str(root), 0.25, False))
    assert set(before["validation"]) <= set(after["validation"]) and set(before["train"]) <= set(after["train"])


def test_what_does_not_fit_is_named(tmp_path):
    root = folders(tmp_path)
    with pytest.raises(FlagError, match="--validation_share: .* has validation already"):
        find_folder(str(root), 0.1, False)
    (root / "validation" / "fox").mkdir()
    with pytest.raises(DataError, match="has 1 classes that .*train does not have: fox"):
        find_folder(str(root), None, False)
    (root / "train" / "fox").mkdir()
    (root / "train" / "fox" / "0.jpg").write_bytes(b"")
    with pytest.raises(DataError) as refused:
        find_folder(str(root), None, False)
    assert "1 files are empty, too large or missing" in str(refused.value)
    assert "1 classes have no images for train: fox" in str(refused.value)
    assert len(find_folder(str(root), None, True).classes) == 4
    with pytest.raises(DataError, match="contains no folder train; it must have train/CLASS"):
        find_folder(str(root / "train"), None, False)
    with pytest.raises(DataError, match="the folder does not exist"):
        find_folder(str(root / "nowhere"), None, False)
    (root / "flat" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="contains none of validation, val, valid, test"):
        find_folder(str(root / "flat"), None, False)


def test_linked_folders_are_followed_and_hidden_ones_left_out(tmp_path):
    root = folders(tmp_path / "raw")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "far.jpg").write_bytes(encoded())
    (root / "train" / "cat" / "part").symlink_to(tmp_path / "disk")
    (root / "train" / "cat" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "cat" / ".ipynb_checkpoints" / "0.jpg").write_bytes(encoded())
    found = names(find_folder(str(root), None, False))["train"]
    assert len(found) == 19 and "cat/part/far.jpg" in found


@pytest.mark.parametrize(
    "links, named",
    [
        ({"cat/self": "cat"}, "cat/self"),
        ({"cat/more": "dog", "dog/more": "cat"}, "cat/more/more"),
        ({"loop": "."}, "loop/loop"),
        ({"cat/up": "."}, "cat/up/cat"),
    ],
)
def test_a_link_to_a_folder_that_contains_it_is_refused(tmp_path, links, named):
    root = folders(tmp_path)
    for link, target in links.items():
        (root / "train" / link).symlink_to(root / "train" / target)
    with pytest.raises(DataError, match=f"train/{named}: a link to a folder that contains it"):
        find_folder(str(root), None, False)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    root = folders(tmp_path)
    (root / "train" / "cat" / "more").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError):
        find_folder(str(root), None, False)


def test_links_to_missing_files_and_other_formats_are_unusable(tmp_path, capsys):
    root = folders(tmp_path)
    (root / "train" / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (root / "train" / "cat" / "0.webp").write_bytes(b"RIFF")
    (root / "train" / "cat" / "more.jfif").write_bytes(encoded())
    with pytest.raises(DataError) as refused:
        find_folder(str(root), None, False)
    assert "gone.jpg (a link to a file that is missing)" in str(refused.value)
    assert "1 images are of a format that is not read, convert them to JPEG: " in str(refused.value)
    found = names(find_folder(str(root), None, True))["train"]
    assert len(found) == 19 and "cat/more.jfif" in found


def test_folders_named_like_splits_are_not_classes(tmp_path):
    root = folders(tmp_path)
    (root / "train").rename(root / "Train")
    (root / "validation").rename(root / "Test")
    with pytest.raises(DataError, match=r"named like splits, not like classes \(Test, Train\)"):
        find_folder(str(root), 0.1, False)


def tiny_imagenet(root):
    for label, synset in enumerate(("n02", "n01")):
        (root / "train" / synset / "images").mkdir(parents=True)
        (root / "train" / synset / f"{synset}_boxes.txt").write_text("x 1 2 3 4\n")
        for number in range(3):
            (root / "train" / synset / "images" / f"{synset}_{number}.JPEG").write_bytes(encoded(seed=label))
    (root / "val" / "images").mkdir(parents=True)
    rows = []
    for number in range(4):
        (root / "val" / "images" / f"val_{number}.JPEG").write_bytes(encoded(seed=number))
        rows.append(f"val_{number}.JPEG\tn0{1 + number % 2}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return root


def test_tiny_imagenet_has_its_validation_labels_in_a_file(tmp_path):
    tiny_imagenet(tmp_path / "tiny-imagenet-200")
    found = find_tiny_imagenet(str(tmp_path), False)
    assert found.classes == ("n01", "n02")
    assert found.splits["validation"].labels.tolist() == [0, 1, 0, 1]
    assert len(found.splits["train"].names) == 6


def test_an_incomplete_tiny_imagenet_is_named(tmp_path):
    with pytest.raises(DataError, match="not Tiny-ImageNet: it has folders train and val"):
        find_tiny_imagenet(str(tmp_path), False)
    root = tiny_imagenet(tmp_path)
    (root / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(DataError, match="val_2.JPEG: is missing, val_annotations.txt names it in line 3"):
        find_tiny_imagenet(str(tmp_path), False)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG n09\n")
    with pytest.raises(DataError, match="line 1: names no class"):
        find_tiny_imagenet(str(tmp_path), False)
