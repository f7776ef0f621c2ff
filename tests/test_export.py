"""Exports hold the scored weights: as arrays, and as a SavedModel that other programs load."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import whole_runs as runs
from conftest import last_line

from resnet_cpu import evaluate
from resnet_cpu.cluster import control
from resnet_cpu.data import folders
from resnet_cpu.errors import FlagError
from resnet_cpu.run import checkpoint

pytestmark = pytest.mark.training

SHORT = ["--phase=main:steps=2,lr=0.05", "--phase=tail:steps=1,lr=0.01"]
# A third-party program: it imports nothing of this package.
CONSUMER = """
import sys
import numpy as np, tensorflow as tf
serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
np.save(sys.argv[3], serve(pixels=tf.constant(np.load(sys.argv[2])))["logits"].numpy())
assert "resnet_cpu" not in sys.modules
"""


@pytest.fixture(scope="module")
def run_dir(tiny_data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("exported") / "run")
    runs.train(control.World(1, 0), tiny_data, folder, *SHORT, "--normalization=authors")
    return folder


def test_arrays_are_those_of_the_checkpoint(run_dir, run_command, tmp_path):
    target = str(tmp_path / "weights.npz")
    process = run_command("evaluate", f"--run_dir={run_dir}", f"--export={target}")
    assert process.returncode == 0, process.stderr
    with np.load(target, allow_pickle=False) as arrays:
        assert not runs.differing(dict(arrays), checkpoint.read_weights(run_dir))
    for place, part in ((target, "already exists"), (f"{tmp_path}/no/such/folder", "does not exist")):
        with pytest.raises(FlagError, match=part):
            evaluate.main([f"--run_dir={run_dir}", f"--export={place}"])


@pytest.mark.parametrize("name", ["model", "model/"])  # a shell completes the second
def test_a_saved_model_scores_raw_pixels_as_evaluate_does(run_dir, tiny_data, tmp_path, capsys, name):
    evaluate.main([f"--run_dir={run_dir}", f"--export={tmp_path}/{name}"])
    scores = json.loads(last_line(capsys.readouterr().out))
    split = folders.open_data(tiny_data, "digits").validation
    examples = [tf.train.Example.FromString(record) for record in split.read(np.arange(split.examples))]
    pixels = [
        tf.io.decode_jpeg(example.features.feature["image/encoded"].bytes_list.value[0], channels=3)
        for example in examples
    ]
    labels = np.array([example.features.feature["image/class/label"].int64_list.value[0] for example in examples])
    np.save(tmp_path / "pixels.npy", np.array(pixels, np.float32))
    subprocess.run(
        [sys.executable, "-c", CONSUMER, tmp_path / "model", tmp_path / "pixels.npy", tmp_path / "logits.npy"],
        check=True,
        cwd=tmp_path,
        timeout=600,
    )
    logits = np.load(tmp_path / "logits.npy").astype(np.float64)
    loss = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels])
    assert scores["loss"] == pytest.approx(loss, rel=1e-5)
    assert scores["top1"] == np.mean(logits.argmax(1) == labels)
