"""Make the image folders of this experiment from Tiny-ImageNet: every second class, at 32x32 pixels.

    python experiments/collapsed_ensemble/border/make_data.py TINY_IMAGENET_200 FOLDER
    python -m resnet_cpu.prepare folder --raw_dir=FOLDER --data_dir=data/half_tiny_imagenet

The last 50 training images of each class are held out for testing, beside the 50 of Tiny-ImageNet's validation set:
450 + 100 images in each of 100 classes. Each pixel is the mean of four.
"""

import argparse
import pathlib
from typing import Dict, List

from PIL import Image

from resnet_cpu.cluster import guard
from resnet_cpu.errors import DataError

SIZE = 32
HELD_OUT = 50  # training images of each class


def main(argv: List[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("raw", type=pathlib.Path, help="tiny-imagenet-200, as unpacked")
    parser.add_argument("out", type=pathlib.Path, help="a folder to write to")
    arguments = parser.parse_args(argv)
    for name in ("train", "val/val_annotations.txt"):
        if not (arguments.raw / name).exists():
            raise DataError(f"{arguments.raw}: has no {name}; name the unpacked folder tiny-imagenet-200")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise DataError(f"{arguments.out}: exists already and is not empty; name a new folder")
    classes = sorted(path.name for path in (arguments.raw / "train").iterdir())[::2]
    validation = of_validation(arguments.raw / "val")
    for number, name in enumerate(classes):
        images = sorted((arguments.raw / "train" / name / "images").iterdir(), key=number_of)
        shrink(images[:-HELD_OUT], arguments.out / "train" / name)
        shrink([*images[-HELD_OUT:], *validation[name]], arguments.out / "validation" / name)
        print(f"{number + 1} of {len(classes)} classes", end="\r", flush=True)
    print()


def number_of(path: pathlib.Path) -> int:
    """Return 12 for n01443537_12.JPEG."""
    return int(path.stem.rpartition("_")[2])


def of_validation(folder: pathlib.Path) -> Dict[str, List[pathlib.Path]]:
    """Return the images of the validation set by class."""
    found: Dict[str, List[pathlib.Path]] = {}
    for line in (folder / "val_annotations.txt").read_text().splitlines():
        image, name = line.split("\t")[:2]
        found.setdefault(name, []).append(folder / "images" / image)
    return found


def shrink(images: List[pathlib.Path], folder: pathlib.Path) -> None:
    """Write the images at SIZE x SIZE, almost without further loss from JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in images:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((SIZE, SIZE), Image.BOX)
        small.save(folder / f"{path.stem}.jpg", quality=98, subsampling=0)


if __name__ == "__main__":
    guard.run(main)
