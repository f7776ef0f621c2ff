"""Data sets in the layouts of TF-slim, written by a plain writer, and of TFDS, written by TFDS itself."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
import whole_runs as runs
from conftest import error_lines, last_line

from resnet_cpu import commandline, evaluate
from resnet_cpu.cluster.control import World
from resnet_cpu.data import batches, datasets, folders, shards
from resnet_cpu.errors import DataError, FlagError
from resnet_cpu.training import opening as job

pytestmark = pytest.mark.training

ALONE = World(1, 0)
CLASSES = 1000


def slim_example(label, generator, size=20, synset=b"n0"):
    image = generator.integers(0, 255, [size + label % 7, size, 3]).astype(np.uint8)
    feature = {
        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[tf.io.encode_jpeg(image).numpy()])),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "image/class/synset": tf.train.Feature(bytes_list=tf.train.BytesList(value=[synset])),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def write_slim(folder, base=1, synset_of=lambda split, label: b"n0"):
    """Write two splits in several shards, with labels base ... base + 999, both ends included."""
    generator = np.random.Generator(np.random.Philox(9))
    for split, total, count in [("train", 3, 40), ("validation", 2, 13)]:
        labels = np.linspace(base, base + CLASSES - 1, count).astype(int)
        for shard in range(total):
            path = os.path.join(folder, f"{split}-{shard:05d}-of-{total:05d}")
            with tf.io.TFRecordWriter(path) as writer:
                for label in labels[shard::total]:
                    writer.write(slim_example(int(label), generator, synset=synset_of(split, int(label))))
    return folder


@pytest.fixture(scope="module")
def slim(tmp_path_factory):
    return write_slim(str(tmp_path_factory.mktemp("slim")))


@pytest.fixture(scope="module")
def tfds_dirs(tmp_path_factory):
    """Data sets prepared by TFDS itself: JPEG with a validation split, PNG with a test split, and some that lack one.

    The last has two labels, one of which it names for classification.
    """
    tfds = pytest.importorskip("tensorflow_datasets")

    def builder(set_name, encoding, splits, supervised=None):
        class Builder(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.2.3")
            name = set_name

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format=encoding),
                    "label": tfds.features.ClassLabel(num_classes=7),
                    "file_name": tfds.features.Text(),
                }
                if supervised:
                    features["coarse_label"] = tfds.features.ClassLabel(names=["even", "odd"])
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=supervised)

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(40 if name == "train" else 11) for name in splits}

            def _generate_examples(self, count):
                generator = np.random.Generator(np.random.Philox(count))
                for i in range(count):
                    image = generator.integers(0, 255, [18, 16 + i % 3, 3]).astype(np.uint8)
                    coarse = {"coarse_label": i % 2} if supervised else {}
                    yield i, {"image": image, "label": i % 7, "file_name": str(i), **coarse}

        return Builder

    folder = str(tmp_path_factory.mktemp("tfds"))
    for row in [
        ("imagenet2012", "jpeg", ["train", "validation"]),
        ("small_png", "png", ["train", "test"]),
        ("only_train", "jpeg", ["train"]),
        ("only_test", "jpeg", ["test"]),
        ("two_labels", "jpeg", ["train", "test"], ("image", "coarse_label")),
    ]:
        builder(*row)(data_dir=folder).download_and_prepare()
    return folder


def train(data_dir, run_dir, *more):
    recipe = ["--phase=main:steps=4,lr=0.01", "--phase=tail:steps=2,lr=0.01,augment=light"]
    return runs.train(ALONE, data_dir, str(run_dir), *recipe, *more)


def test_slim_shards_train_and_evaluate_exactly(slim, tmp_path):
    result = train(slim, tmp_path / "run", "--dataset=imagenet", "--image_size=16")
    assert result["complete"] and result["examples"] == 13
    data = folders.open_data(slim, "imagenet")
    assert (data.train.examples, data.validation.examples, data.label_base, data.num_classes) == (40, 13, 1, 1000)
    written = [raw.numpy() for raw in tf.data.TFRecordDataset(sorted(tf.io.gfile.glob(f"{slim}/train-?????-of-00003")))]
    assert data.train.read(np.arange(40)) == written
    assert os.path.exists(shards.index_path(f"{slim}/train-00000-of-00003"))


def test_a_read_only_folder_is_indexed_in_memory(tmp_path, monkeypatch, capfd):
    folder = write_slim(str(tmp_path))

    def refuse(path, content):
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr(shards, "write_atomically", refuse)
    folders.make_indexes(folders.describe(folder, "imagenet"), folder)
    assert "cannot write indexes (Read-only file system)" in capfd.readouterr().err
    assert folders.open_data(folder, "imagenet").train.examples == 40


def test_labels_from_0_in_the_slim_layout_are_refused(tmp_path):
    os.makedirs(tmp_path / "data")
    folder = write_slim(str(tmp_path / "data"), base=0)
    with pytest.raises(DataError, match="record 0: label 0 is outside the 1000 classes 1..1000"):
        train(folder, tmp_path / "run", "--dataset=imagenet", "--image_size=16")


def test_labels_in_another_order_than_the_wordnet_ids_are_refused(tmp_path):
    def usual(split, label):
        return b"n%08d" % (1440764 + 13 * label)

    def check(name, synset_of):
        os.makedirs(tmp_path / name)
        data = folders.open_data(write_slim(str(tmp_path / name), synset_of=synset_of), "imagenet")
        batches.check_label_base(commandline.parse(["--dataset=imagenet"]), data)

    check("usual", usual)
    with pytest.raises(DataError, match="train-.*labels must rise with the sorted WordNet ids"):
        check("reversed", lambda split, label: usual(split, CLASSES + 1 - label))
    with pytest.raises(DataError, match="validation-.* contradict each other"):
        check("shifted", lambda split, label: usual(split, label - (split == "validation")))


def test_an_incomplete_slim_set_is_refused(slim, tmp_path):
    folder = str(tmp_path / "data")
    shutil.copytree(slim, folder)
    os.remove(f"{folder}/train-00001-of-00003")
    with pytest.raises(DataError, match="1 shards missing, the first is train-00001-of-00003"):
        folders.describe(folder, "imagenet")
    shutil.copy(f"{folder}/train-00000-of-00003", f"{folder}/train-00000-of-00004")
    with pytest.raises(DataError, match="of-00003 and of-00004"):
        folders.describe(folder, "imagenet")


@pytest.mark.parametrize(
    "dataset, more",
    [("imagenet", ["--num_classes=7"]), ("tfds:imagenet2012", ["--num_classes=7"]),
     ("tfds:small_png", ["--num_classes=7", "--normalization=torch"])],
)  # fmt: skip
def test_tfds_sets_train_and_evaluate_exactly(tfds_dirs, tmp_path, dataset, more):
    tfds = pytest.importorskip("tensorflow_datasets")
    result = train(tfds_dirs, tmp_path / "run", f"--dataset={dataset}", "--image_size=16", *more)
    assert result["complete"] and result["examples"] == 11
    data = folders.open_data(tfds_dirs, dataset)
    assert (data.label_base, data.num_classes) == (0, 7)
    name = "small_png" if "png" in dataset else "imagenet2012"
    read = tfds.builder_from_directory(f"{tfds_dirs}/{name}/1.2.3").as_dataset(split="train", shuffle_files=False)
    expected = [(int(e["label"]), e["image"].numpy().tobytes()) for e in read]
    found = []
    for payload in data.train.read(np.arange(data.train.examples)):
        feature = tf.train.Example.FromString(payload).features.feature
        image = tf.io.decode_image(feature[data.image_key].bytes_list.value[0], channels=3).numpy()
        found.append((feature[data.label_key].int64_list.value[0], image.tobytes()))
    assert sorted(found) == sorted(expected)


def test_tfds_sets_that_lack_a_split_are_trained_on_or_evaluated(tfds_dirs, tmp_path, capsys):
    run_dir = tmp_path / "run"
    result = train(tfds_dirs, run_dir, "--dataset=tfds:only_train", "--num_classes=7", "--image_size=16")
    assert result["complete"] and result["top1"] is None
    assert capsys.readouterr().err.count("has neither a validation nor a test split") == 1
    evaluate.main([f"--run_dir={run_dir}", "--dataset=tfds:only_test"])
    assert json.loads(last_line(capsys.readouterr().out))["examples"] == 11
    with pytest.raises(DataError, match="has no split to train on"):
        train(tfds_dirs, tmp_path / "other", "--dataset=tfds:only_test", "--num_classes=7")


def test_the_label_that_a_tfds_set_names_is_used(tfds_dirs):
    data = folders.open_data(tfds_dirs, "tfds:two_labels")
    assert (data.label_key, data.num_classes, data.classes) == ("coarse_label", 2, ("even", "odd"))
    assert folders.open_data(tfds_dirs, "tfds:small_png").label_key == "label"


def test_tfds_folders_are_found_or_refused(tfds_dirs, tmp_path):
    version = f"{tfds_dirs}/small_png/1.2.3"
    assert folders.describe(version, "tfds:small_png")["folder"] == version
    with pytest.raises(DataError, match="contains small_png, not other"):
        folders.describe(version, "tfds:other")
    with pytest.raises(DataError, match="contains no other prepared by TFDS"):
        folders.describe(tfds_dirs, "tfds:other")
    folder = str(tmp_path / "two")
    for number in ("1.0.0", "1.2.3"):
        shutil.copytree(version, f"{folder}/small_png/{number}")
    with pytest.raises(DataError, match="contains 2 versions of small_png"):
        folders.describe(folder, "tfds:small_png")
    shutil.rmtree(f"{folder}/small_png/1.0.0")
    info = f"{folder}/small_png/1.2.3/dataset_info.json"
    with open(info) as file:
        content = json.load(file)
    content["splits"][0]["shardLengths"][0] = "39"
    with open(info, "w") as file:
        json.dump(content, file)
    with pytest.raises(DataError, match="description says 39|description says 10"):
        folders.open_data(folder, "tfds:small_png")


def test_a_folder_without_a_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither manifest.json, nor train-00000-of-01024"):
        folders.describe(str(tmp_path), "imagenet")
    with pytest.raises(DataError, match="the folder does not exist"):
        folders.describe(str(tmp_path / "nothing"), "tfds:x")


def test_the_number_of_classes_of_a_tfds_set_is_given_by_the_user(tfds_dirs, tmp_path):
    with pytest.raises(FlagError, match="--num_classes is missing"):
        train(tfds_dirs, tmp_path / "run", "--dataset=tfds:small_png")
    with pytest.raises(DataError, match="has 7 classes, the model only 5"):
        train(tfds_dirs, tmp_path / "run", "--dataset=tfds:small_png", "--num_classes=5")
    with pytest.raises(FlagError, match="unknown; use one of"):
        train(tfds_dirs, tmp_path / "run", "--dataset=tfds:../x", "--num_classes=5")


def test_a_folder_that_should_fix_the_classes_is_named(tmp_path):
    """Fault: whatever was wrong with it, --num_classes was said to be missing."""
    words = ["--dataset=folder", f"--data_dir={tmp_path}/moved"]
    with pytest.raises(DataError, match="moved: the folder does not exist"):
        commandline.parse(words, "train")
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="manifest.json: not readable as JSON"):
        commandline.parse(words, "train")
    with pytest.raises(FlagError, match="--num_classes is missing; give it, or --data_dir with"):
        commandline.parse(words[:1], "train")
    manifest = {"num_classes": 3, "splits": {"train": [{"examples": 5}]}}
    (tmp_path / "moved" / "manifest.json").write_text(json.dumps(manifest))
    assert commandline.parse(words, "train").model.num_classes == 3  # also without a split to evaluate on
    assert commandline.parse([*words, "--num_classes=3"], "train").model.num_classes == 3  # negative control
    for splits in (["train"], None):  # fault: a traceback
        (tmp_path / "moved" / "manifest.json").write_text(json.dumps({"num_classes": 3, "splits": splits}))
        with pytest.raises(DataError, match="manifest.json: not the manifest of a data set"):
            commandline.parse(words, "train")


def test_a_folder_of_a_known_set_without_training_images_does_not_change_its_size(tmp_path):
    (tmp_path / "manifest.json").write_text('{"num_classes": 1000, "splits": {"validation": [{"examples": 5}]}}')
    facts = datasets.facts_of("imagenet", str(tmp_path))
    assert (facts.train_examples, facts.validation_examples) == (1281167, 5)


def test_verify_reads_shards_written_by_others(slim, run_command, tmp_path):
    process = run_command("prepare", "verify", f"--data_dir={slim}")
    assert process.returncode == 0 and json.loads(last_line(process.stdout)) == {"train": 40, "validation": 13}
    folder = str(tmp_path / "data")
    shutil.copytree(slim, folder)
    with open(f"{folder}/validation-00001-of-00002", "r+b") as file:
        file.seek(200)
        file.write(b"\x00\x01")
    process = run_command("prepare", "verify", f"--data_dir={folder}")
    assert process.returncode == 65 and "validation-00001-of-00002: record 0" in error_lines(process)[0]


def test_opening_needs_no_run(slim):
    settings = commandline.parse(["--dataset=imagenet", f"--data_dir={slim}"])
    assert job.open_data(settings, ALONE).train.examples == 40


def test_a_set_that_is_half_prepared_is_named_as_such(tmp_path):
    folder = tmp_path / "imagenet"
    folder.mkdir()
    shards.write_split(str(folder), "train", iter([b"x"] * 3), 3, 3)
    (folder / "train-00001-of-00003").unlink()
    with pytest.raises(DataError, match="1 shards missing, the first is train-00001-of-00003; copy them"):
        folders.describe(str(folder), "imagenet")
    (folder / shards.UNFINISHED).mkdir()
    with pytest.raises(DataError, match="prepare was interrupted: repeat its command, which continues"):
        folders.describe(str(folder), "imagenet")
