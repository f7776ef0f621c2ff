"""`--init_from`: weights by name from a run, a checkpoint or an export; which are left, and which are refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import whole_runs as runs
from conftest import TINY_FLAGS

from resnet_cpu import commandline
from resnet_cpu.cluster import control
from resnet_cpu.errors import CheckpointError
from resnet_cpu.run import checkpoint
from resnet_cpu.training import state

pytestmark = pytest.mark.training

ALONE = control.World(1, 0)
SHORT = [*runs.SYNTHETIC, "--phase=main:steps=2,lr=0.05", "--phase=tail:steps=1,lr=0.01"]


@pytest.fixture(scope="module")
def source(tiny_data, tmp_path_factory):
    """The folder of a finished run, not to be changed."""
    folder = str(tmp_path_factory.mktemp("source") / "run")
    runs.train(ALONE, tiny_data, folder, *SHORT)
    return folder


def model(*more):
    return state.build_model(commandline.parse([*TINY_FLAGS, "--seed=5", *more]))


def test_every_array_is_taken_by_name(source):
    fresh = model()
    taken, initial, lines = state.take_over(fresh, source)
    arrays = checkpoint.load(checkpoint.folder(source, 3), "weights")
    assert taken == len(fresh.variables) == len(arrays) == len(lines) and not initial
    assert all(line.startswith("taken   ") for line in lines)
    for variable in fresh.variables:
        np.testing.assert_array_equal(variable.numpy(), arrays[variable.name])


def test_a_folder_of_a_run_a_checkpoint_and_a_file_name_the_same_weights(source, tmp_path):
    exported = str(tmp_path / "mine.npz")
    checkpoint.write_weights(exported, checkpoint.read_weights(source))
    for path in (source, checkpoint.folder(source, 3), exported, f"{checkpoint.folder(source, 3)}/weights.npz"):
        arrays = checkpoint.read_weights(path)
        assert not runs.differing(arrays, checkpoint.read_weights(source))


def test_a_classifier_for_other_classes_keeps_its_initial_values_and_is_listed(source):
    fresh = model("--num_classes=12")
    before = fresh.get_layer("logits").get_weights()
    taken, initial, lines = state.take_over(fresh, source)
    assert taken == len(fresh.variables) - 2
    assert initial == [
        "logits/kernel:0 ((64, 12) in this network, (64, 10) in the file)",
        "logits/bias:0 ((12,) in this network, (10,) in the file)",
    ]
    assert "initial logits/bias:0 ((12,) in this network, (10,) in the file)" in lines
    for old, new in zip(before, fresh.get_layer("logits").get_weights()):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    "flag, part", [("--width=0.25", "conv1_conv/kernel:0"), ("--model=resnet50", "missing in the file")]
)
def test_another_network_is_refused_and_nothing_taken(source, flag, part):
    fresh = model(flag)
    before = [variable.numpy() for variable in fresh.variables]
    with pytest.raises(CheckpointError, match="belongs to another network") as caught:
        state.take_over(fresh, source)
    assert part in str(caught.value)
    for old, variable in zip(before, fresh.variables):
        np.testing.assert_array_equal(old, variable.numpy())


def test_weights_of_a_deeper_network_are_refused(source, tmp_path):
    """All our names exist in the file, and one more: half of a network must not be taken."""
    exported = str(tmp_path / "deeper.npz")
    more = {"conv5_block3_1_conv/kernel:0": np.zeros([1, 1, 4, 4], np.float32)}
    checkpoint.write_weights(exported, {**checkpoint.read_weights(source), **more})
    with pytest.raises(CheckpointError, match=r"conv5_block3_1_conv/kernel:0 \(only in the file\)"):
        state.take_over(model(), exported)


def test_weights_that_changed_before_the_first_step_are_refused(tiny_data, source, tmp_path, monkeypatch):
    exported = str(tmp_path / "mine.npz")
    arrays = checkpoint.read_weights(source)
    checkpoint.write_weights(exported, arrays)
    original = runs.loop.run

    def change_then_run(opened):
        checkpoint.write_weights(exported, {name: array + 1 for name, array in arrays.items()})
        return original(opened)

    def remove_then_run(opened):
        pathlib.Path(exported).unlink()
        return original(opened)

    for instead in (change_then_run, remove_then_run):
        monkeypatch.setattr(runs.loop, "run", instead)
        with pytest.raises(CheckpointError, match="was changed or removed after this run began"):
            runs.train(ALONE, tiny_data, str(tmp_path / "run"), *SHORT, f"--init_from={exported}")
    checkpoint.write_weights(exported, arrays)
    monkeypatch.undo()  # no step was done, so the same folder may be used with the new file
    assert runs.train(ALONE, tiny_data, str(tmp_path / "run"), *SHORT, f"--init_from={exported}")["complete"]


def test_a_path_without_weights_is_refused(tmp_path, source):
    with pytest.raises(CheckpointError, match="no weights found; name"):
        checkpoint.read_weights(str(tmp_path))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(CheckpointError, match=r"broken\.npz: unreadable"):
        checkpoint.read_weights(str(tmp_path / "broken.npz"))
    kinds = {"not finite": [1.0, np.nan], "of type complex128": [1j], "of type <U1": ["x"], "of type bool": [True]}
    for part, values in kinds.items():
        np.savez(tmp_path / "odd.npz", kernel=np.array(values))
        with pytest.raises(CheckpointError, match=f"odd.npz: kernel is {part}"):
            checkpoint.read_weights(str(tmp_path / "odd.npz"))
    damaged = tmp_path / "run"
    shutil.copytree(source, damaged)
    weights = pathlib.Path(checkpoint.folder(str(damaged), 3), "weights.npz")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read_weights(checkpoint.folder(str(damaged), 3))


def test_a_run_starts_from_them_and_resumes_without_them(tiny_data, source, tmp_path, capsys):
    """Weights only, from step 0: the first loss is that of the source's weights; a resumed run gives the same bits."""
    origin, run, whole = (str(tmp_path / name) for name in ("origin", "run", "whole"))
    shutil.copytree(source, origin)
    for folder in (run, whole):
        stop = ["--max_steps=1"] if folder == run else []
        runs.train(ALONE, tiny_data, folder, *SHORT, f"--init_from={origin}", *stop)
    assert "--init_from=" in capsys.readouterr().err
    assert pathlib.Path(run, "init_from.txt").read_text().startswith("taken   conv1_conv/kernel:0")
    untrained = str(tmp_path / "untrained")
    runs.train(ALONE, tiny_data, untrained, *SHORT)
    assert runs.losses(run)[0] == runs.losses(whole)[0] != runs.losses(untrained)[0]
    shutil.rmtree(origin)
    runs.train(ALONE, tiny_data, run, *SHORT, f"--init_from={origin}", "--resume=must")
    assert not runs.differing(runs.final_state(run), runs.final_state(whole))
    assert json.loads(pathlib.Path(run, "run.json").read_text())["init_from"]["path"] == origin
    with pytest.raises(CheckpointError, match="init_from"):
        runs.train(ALONE, tiny_data, run, *SHORT)
