"""ImageNet (ILSVRC 2012) as people have it: two archives and the validation labels, or folders unpacked from them."""

import csv
import os
import re
import sys
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from resnet_cpu.data.datasets import DATASETS
from resnet_cpu.data.sources import archives, image_folders
from resnet_cpu.data.sources.listing import MOST_BYTES, Collector, Listing, size_of, some, unusable, walk
from resnet_cpu.errors import DataError

_TRAIN_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG")
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_CLASS = re.compile(r"n\d{8}")
_TRAIN = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_train", "train")
_VALIDATION = ("ILSVRC2012_img_val.tar", "ILSVRC2012_img_val", "val", "validation")
_SYNSETS = "imagenet_2012_validation_synset_labels.txt"
_SOLUTION = "LOC_val_solution.csv"  # of Kaggle's copy
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"  # of the development kit: numbers of classes, 1 to 1000
_SYNSETS_OF_KIT = ("synsets.txt", "map_clsloc.txt", "meta.mat")  # which number is which synset
_KIT = "ILSVRC2012_devkit_t12"
_LABELS_WANTED = (
    f"{_SYNSETS} (one synset a line), {_SOLUTION}, or {_TRUTH} of the development kit with its list of synsets (one of "
    f"{', '.join(_SYNSETS_OF_KIT)})"
)


class _Image(NamedTuple):
    name: str
    file: str
    offset: int
    size: int


def find(raw_dir: str, allow_incomplete: bool) -> Listing:
    """Return what lies in `raw_dir`; labels are 1 to 1000 in the order of the sorted synsets.

    Raises DataError if something is missing or too much, unless `allow_incomplete`; nothing is unpacked.
    """
    train_at, validation_at = (_locate(raw_dir, names) for names in (_TRAIN, _VALIDATION))
    images: Dict[str, List[_Image]] = {"train": list(_images(train_at)), "validation": list(_images(validation_at))}
    problems: List[str] = []
    train = _named(images["train"], _TRAIN_IMAGE, "training", problems)
    validation = _named(images["validation"], _VALIDATION_IMAGE, "validation", problems)
    synset_of = _validation_synsets(raw_dir, validation_at, [image.name for image in validation])
    classes = sorted({image.name.split("_")[0] for image in train})
    if not classes:
        raise DataError(f"{train_at}: contains no training images, named as n01440764_10026.JPEG")
    number = {name: label for label, name in enumerate(classes)}
    files: List[str] = []
    splits = {"train": Collector("train"), "validation": Collector("validation")}
    for image in train:
        _add(splits["train"], image, number[image.name.split("_")[0]], files)
    unlabelled, unknown = [], set()
    for image in validation:
        synset = synset_of.get(image.name)
        if synset is None:
            unlabelled.append(image.name)
        elif synset not in number:
            unknown.add(synset)
        else:
            _add(splits["validation"], image, number[synset], files)
    if unlabelled:
        problems.append(f"{len(unlabelled):,} validation images without a label: {some(unlabelled)}")
    if unknown:
        problems.append(f"{len(unknown):,} validation labels without training images: {some(sorted(unknown))}")
    without = sorted(set(classes) - set(synset_of.values()))
    if without:
        problems.append(f"{len(without):,} classes that the validation labels do not name: {some(without)}")
    tables = {split: collector.table() for split, collector in splits.items()}
    problems += _counts(len(classes), len(tables["train"].names), len(tables["validation"].names))
    listing = Listing("imagenet", "ILSVRC 2012", tuple(classes), 1, tuple(files), tables)
    _judge(raw_dir, problems, allow_incomplete)
    return listing


def _judge(raw_dir: str, problems: Sequence[str], allow_incomplete: bool) -> None:
    if not problems:
        return
    text = f"--raw_dir={raw_dir}: not the whole of ImageNet: {'; '.join(problems)}"
    if not allow_incomplete:
        raise DataError(f"{text}; complete the files, or prepare what is there with --allow_incomplete")
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def _counts(classes: int, train: int, validation: int) -> Iterator[str]:
    facts = DATASETS["imagenet"]
    for what, found, right in (
        ("classes", classes, facts.num_classes),
        ("training images", train, facts.train_examples),
        ("validation images", validation, facts.validation_examples),
    ):
        assert right is not None
        if found != right:
            difference = f"{abs(found - right):,} {'missing' if found < right else 'too many'}"
            yield f"{found:,} {what} where it has {right:,} ({difference})"


def _add(split: Collector, image: _Image, label: int, files: List[str]) -> None:
    if not files or files[-1] != image.file:
        files.append(image.file)
    split.add(image.name, label, len(files) - 1, image.offset, image.size)


def _named(images: Sequence[_Image], pattern: "re.Pattern[str]", what: str, problems: List[str]) -> List[_Image]:
    """Return the images with a name as in ImageNet and bytes within the limits; the others become a problem."""
    kept, others, sizes = [], [], []
    for image in images:
        if not pattern.fullmatch(image.name):
            others.append(image.name)
            continue
        fault = unusable(image.name, image.size)
        if fault is None:
            kept.append(image)
        else:
            sizes.append(fault)
    if others:
        problems.append(f"{len(others):,} files that are not {what} images: {some(others)}")
    if sizes:
        problems.append(
            f"{len(sizes):,} {what} images that are empty, missing or larger than {MOST_BYTES:,} bytes: {some(sizes)}"
        )
    return kept


def _locate(raw_dir: str, names: Sequence[str]) -> str:
    image_folders.existing(raw_dir)
    for name in names:
        path = os.path.join(raw_dir, name)
        if os.path.exists(path):
            return path
    raise DataError(f"--raw_dir={raw_dir}: contains neither {' nor '.join(names)}; name the folder of ImageNet's files")


def _images(path: str) -> Iterator[_Image]:
    """Yield the images of an archive (of archives, one per class), or of a folder with images, classes or archives."""
    if os.path.isdir(path):
        for folder, names in walk(path):
            for name in names:
                file = os.path.join(folder, name)
                if name.endswith(".tar"):
                    yield from _in_archive(file)
                elif not name.startswith("."):
                    yield _Image(name, file, 0, size_of(file))
        return
    yield from _in_archive(path)


def _in_archive(path: str) -> Iterator[_Image]:
    with open(path, "rb") as file:
        for member in archives.members(path, file):
            if member.name.endswith(".tar") and _CLASS.fullmatch(member.name[:-4]):
                for image in archives.members(path, file, member.offset, member.size, member.name):
                    yield _Image(image.name, path, image.offset, image.size)
            elif not member.name.startswith("."):
                yield _Image(member.name, path, member.offset, member.size)


# --- validation labels -----------------------------------------------------------------------------------------------


def _validation_synsets(raw_dir: str, validation_at: str, images: Sequence[str]) -> Dict[str, str]:
    """Return the synset of each of the validation `images`, from the class folders or from a file of labels."""
    by_folder = {
        name: os.path.basename(folder)
        for folder, names in (walk(validation_at) if os.path.isdir(validation_at) else ())
        for name in names
        if _CLASS.fullmatch(os.path.basename(folder))
    }
    if by_folder:
        return by_folder
    path = _find(raw_dir, _SYNSETS)
    if path is not None:
        return _numbered(path, _lines(path), images)
    path = _find(raw_dir, _SOLUTION)
    if path is not None:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            rows = [row for row in csv.reader(file) if len(row) == 2 and row[0].startswith("ILSVRC2012_val_")]
        return {f"{name}.JPEG": boxes.split()[0] for name, boxes in rows if boxes}
    path = _find(raw_dir, _TRUTH)
    if path is not None:
        of_number, numbers = _synsets_of_kit(raw_dir), _lines(path)
        try:
            return _numbered(path, [of_number[int(number)] for number in numbers], images)
        except (KeyError, ValueError) as error:
            raise DataError(f"{path}: {error} is not the number of a class; take the file of the kit again") from None
    if _find(raw_dir, _KIT + ".tar.gz"):
        raise DataError(f"--raw_dir={raw_dir}: unpack {_KIT}.tar.gz there; it holds the validation labels")
    raise DataError(f"--raw_dir={raw_dir}: no labels of the validation images: put {_LABELS_WANTED} there")


def _find(raw_dir: str, name: str) -> Optional[str]:
    """Return the path of a file in `raw_dir` or in the unpacked development kit in it."""
    kit = os.path.join(raw_dir, _KIT)
    for folder in (raw_dir, os.path.join(raw_dir, "data"), kit, os.path.join(kit, "data")):
        if os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    return None


def _lines(path: str) -> List[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().split()


def _numbered(path: str, synsets: Sequence[str], images: Sequence[str]) -> Dict[str, str]:
    """Return the synset of each image, from the list in the order of the images' numbers.

    Raises DataError for a list of another length than the whole set or the images that are there: of such a list, one
    line may be missing or too many anywhere, and all labels after it would be wrong. No flag allows that.
    """
    wrong = [synset for synset in synsets if not _CLASS.fullmatch(synset)]
    if wrong:
        raise DataError(f"{path}: {wrong[0][:40]!r} is not a synset, as n01440764; the file must hold one a line")
    highest = max((int(name[-len("00000001.JPEG") : -len(".JPEG")]) for name in images), default=0)
    whole = DATASETS["imagenet"].validation_examples
    if len(synsets) not in (highest, whole):
        raise DataError(
            f"{path}: {len(synsets):,} labels, but validation images up to number {highest:,}: line N is the label of "
            f"image N, so labels could belong to other images; take the file again, which has {whole:,} lines"
        )
    return {f"ILSVRC2012_val_{number:08d}.JPEG": synset for number, synset in enumerate(synsets, 1)}


def _synsets_of_kit(raw_dir: str) -> Dict[int, str]:
    """Return the synset of each number of the development kit."""
    found = next((path for name in _SYNSETS_OF_KIT for path in [_find(raw_dir, name)] if path), None)
    if found is None:
        raise DataError(
            f"--raw_dir={raw_dir}: {_TRUTH} needs the kit's list of synsets, one of {', '.join(_SYNSETS_OF_KIT)}"
        )
    if found.endswith(".mat"):
        return _synsets_of_matlab(found)
    of_number: Dict[int, str] = {}
    with open(found, encoding="utf-8", errors="replace") as file:
        for line, text in enumerate(file, 1):
            words = text.split()
            synset = next((word for word in words[:2] if _CLASS.fullmatch(word)), None)
            number = next((int(word) for word in words[:2] if word.isdigit()), line)
            if synset is not None:
                of_number[number] = synset
    return of_number


def _synsets_of_matlab(path: str) -> Dict[int, str]:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError:
        raise DataError(f"{path}: reading it needs scipy; install it, or use {_SYNSETS}") from None
    try:
        rows = loadmat(path, squeeze_me=True)["synsets"]
        pairs: List[Tuple[int, str]] = [(int(row["ILSVRC2012_ID"]), str(row["WNID"])) for row in rows]
    except (KeyError, ValueError, OSError, TypeError, NotImplementedError, MatReadError) as error:
        raise DataError(f"{path}: not the kit's list of synsets ({error}); take the file of the kit again") from None
    return {number: synset for number, synset in pairs if number <= 1000}
