"""Raw data as users have them, made up: images of many kinds, ImageNet's archives in their real shape, folders."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

SYNSETS = [f"n{10_000_000 + 137 * number:08d}" for number in range(1000)]


def pixels(seed=0, height=40, width=48, channels=3):
    """Return smooth random pixels, uint8: noise alone compresses badly."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, channels), np.uint8)
    return np.asarray(
        Image.merge("RGBA"[:channels] if channels == 4 else {1: "L", 3: "RGB"}[channels], [
            Image.fromarray(small[..., channel]).resize((width, height)) for channel in range(channels)
        ])
    ).reshape(height, width, channels)  # fmt: skip


def encoded(kind="JPEG", seed=0, height=40, width=48, **options):
    """Return an encoded image of a kind: JPEG, grey, CMYK, PNG, GIF, BMP, alpha, 16 bit, palette, rotated."""
    image = Image.fromarray(pixels(seed, height, width))
    suffix = "JPEG" if kind in ("JPEG", "grey", "CMYK", "rotated") else "PNG"
    if kind in ("GIF", "BMP"):
        suffix = kind
    if kind == "grey":
        image = image.convert("L")
    elif kind == "CMYK":
        image = image.convert("CMYK")
    elif kind == "alpha":
        image.putalpha(128)
    elif kind == "16 bit":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif kind == "palette":
        image = image.quantize(128, dither=Image.Dither.NONE)
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def tar(files, outer=None):
    """Return (or write to the file `outer`) a tar archive of {name: content}."""
    buffer = outer or io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return None if outer else buffer.getvalue()


def imagenet(folder, classes=10, per_class=3, validation=20, odd=True, labels="synsets"):
    """Write ImageNet's two archives and the validation labels, small; return {file name: (synset, content)}."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ["CMYK", "PNG", "grey", "GIF", "BMP", "rotated"] if odd else []
    some = [encoded(seed=seed) for seed in range(8)]
    made, inner = {}, {}
    for label, synset in enumerate(SYNSETS[:classes]):
        files = {}
        for number in range(per_class):
            kind = kinds.pop() if kinds and number == 1 else None
            content = encoded(kind, seed=label) if kind else some[(label + number) % len(some)]
            files[f"{synset}_{7 * number}.JPEG"] = content
        made.update({name: (synset, content) for name, content in files.items()})
        inner[f"{synset}.tar"] = tar(files)
    with open(folder / "ILSVRC2012_img_train.tar", "wb") as file:
        tar(inner, file)
    synsets = [SYNSETS[(number * 7) % classes] for number in range(validation)]
    files = {f"ILSVRC2012_val_{number + 1:08d}.JPEG": some[number % len(some)] for number in range(validation)}
    made.update({name: (synset, files[name]) for name, synset in zip(files, synsets)})
    with open(folder / "ILSVRC2012_img_val.tar", "wb") as file:
        tar(files, file)
    write_labels(folder, synsets, classes, labels)
    return made


def write_labels(folder, synsets, classes, kind):
    """Write the synset of each validation image in one of the forms in which people have them."""
    numbers = {synset: classes - label for label, synset in enumerate(SYNSETS[:classes])}  # of the kit: another order
    if kind == "synsets":
        (folder / "imagenet_2012_validation_synset_labels.txt").write_text("".join(f"{one}\n" for one in synsets))
    elif kind == "solution":
        rows = [f"ILSVRC2012_val_{number:08d},{one} 1 2 3 4 {one} 5 6 7 8" for number, one in enumerate(synsets, 1)]
        (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]) + "\n")
    elif kind in ("kit", "kit without list"):
        data = folder / "ILSVRC2012_devkit_t12" / "data"
        data.mkdir(parents=True)
        text = "".join(f"{numbers[one]}\n" for one in synsets)
        (data / "ILSVRC2012_validation_ground_truth.txt").write_text(text)
        if kind == "kit":
            rows = [f"{one} {number} name_of_it" for one, number in numbers.items()]
            (folder / "map_clsloc.txt").write_text("\n".join(rows))


def folders(root, classes=("cat", "dog", "eel"), train=6, validation=3):
    """Write train/CLASS/... and validation/CLASS/... with images of several formats."""
    root = pathlib.Path(root)
    kinds = {"JPEG": "jpg", "PNG": "png", "grey": "JPEG", "BMP": "bmp"}
    for split, count in (("train", train), ("validation", validation)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                kind = list(kinds)[number % len(kinds)]
                content = encoded(kind, seed=100 * label + number)
                (root / split / name / f"{number}.{kinds[kind]}").write_bytes(content)
    return root
