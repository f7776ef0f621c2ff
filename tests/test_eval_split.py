"""Sets that lack a split, and lists of classes: what is trained and evaluated, and what is refused."""

import json
import os
import shutil

import pytest
import whole_runs as runs
from conftest import TINY_FLAGS, last_line

from resnet_cpu import commandline, evaluate
from resnet_cpu.cluster.control import World
from resnet_cpu.data import shards
from resnet_cpu.errors import CheckpointError, DataError
from resnet_cpu.run.folder import read_json
from resnet_cpu.training import ensemble

pytestmark = pytest.mark.training

ALONE = World(1, 0)
SHORT = [*runs.SHORT, "--max_steps=3"]
NAMES = [f"digit {number}" for number in range(10)]


@pytest.fixture
def variant(tiny_data, tmp_path):
    """Return a function that makes a copy of the tiny data set with another manifest."""

    def make(name, splits=None, **changes):
        folder = str(tmp_path / name)
        shutil.copytree(tiny_data, folder)
        manifest = shards.read_manifest(folder)
        kept = {new: manifest["splits"][old] for new, old in (splits or {}).items()} or manifest["splits"]
        shards.write_manifest(folder, {**manifest, "splits": kept, **changes})
        return folder

    return make


def train(data_dir, run_dir, *more):
    return runs.train(ALONE, data_dir, str(run_dir), *SHORT, *more)


def score(capsys, run_dir, *more):
    evaluate.main([f"--run_dir={run_dir}", *more])
    return json.loads(last_line(capsys.readouterr().out))


def test_a_set_for_training_alone_trains_with_one_warning(variant, tmp_path, capsys):
    folder, run_dir = variant("data", {"train": "train", "holdout": "validation"}), tmp_path / "run"
    result = train(folder, run_dir)
    assert (result["steps"], result["top1"], result["examples"]) == (3, None, 0)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and "has neither a validation nor a test split; it has holdout" in warnings[0]
    assert not (run_dir / "eval.jsonl").exists()
    with pytest.raises(DataError, match="no split to evaluate on .* as in --eval_split=holdout"):
        score(capsys, run_dir)
    assert score(capsys, run_dir, "--eval_split=holdout")["examples"] == 21
    assert score(capsys, run_dir, "--eval_split=train")["examples"] == 50


def test_none_trains_without_evaluation_and_without_a_warning(tiny_data, tmp_path, capsys):
    assert train(tiny_data, tmp_path / "run", "--eval_split=none")["top1"] is None
    assert "WARNING" not in capsys.readouterr().err
    with pytest.raises(DataError, match=r"no split to evaluate on \(--eval_split=none\)"):
        score(capsys, tmp_path / "run")
    assert score(capsys, tmp_path / "run", "--eval_split=auto")["examples"] == 21


def test_members_are_kept_where_nothing_is_evaluated(tiny_data, tmp_path):
    result = runs.train(ALONE, tiny_data, str(tmp_path / "run"), *runs.TREE, "--eval_split=none")
    assert result["complete"] and "ensemble" not in result
    assert sorted(os.listdir(tmp_path / "run" / "members")) == ["collapse", "tail"]


def test_a_set_for_evaluation_alone_is_evaluated_but_not_trained_on(variant, tiny_data, tmp_path, capsys):
    folder = variant("data", {"test": "validation"})
    result = train(tiny_data, tmp_path / "run")
    found = score(capsys, tmp_path / "run", f"--data_dir={folder}")
    assert found["examples"] == 21 and found["top1"] == result["top1"]
    with pytest.raises(DataError, match="has no split to train on"):
        train(folder, tmp_path / "other")


def test_predictions_of_another_split_do_not_count():
    auto, named = (commandline.parse([*TINY_FLAGS, f"--eval_split={name}"]) for name in ("auto", "test"))
    assert "eval_split" not in ensemble.evaluation_settings(auto)  # as predictions of earlier versions
    assert ensemble.evaluation_settings(named) == {**ensemble.evaluation_settings(auto), "eval_split": "test"}


def test_another_list_of_classes_is_refused_with_the_first_difference(variant, tmp_path, capsys):
    listed, run_dir = variant("data", classes=NAMES), tmp_path / "run"
    train(listed, run_dir)
    assert read_json(str(run_dir / "run.json"))["classes"] == NAMES
    assert score(capsys, run_dir)["examples"] == 21
    exchanged = [*NAMES[:3], NAMES[4], NAMES[3], *NAMES[5:]]
    other = variant("other", classes=exchanged)
    with pytest.raises(DataError, match="trained on other classes: class 3 was digit 3, here it is digit 4"):
        score(capsys, run_dir, f"--data_dir={other}")
    with pytest.raises(CheckpointError, match=r"data\.classes: "):
        runs.train(ALONE, other, str(run_dir), *runs.SHORT)
    os.remove(run_dir / "run.json")
    with pytest.raises(DataError, match="trained on other classes: .* other digests"):
        score(capsys, run_dir, f"--data_dir={other}")


def test_an_unknown_list_of_classes_is_accepted(variant, tiny_data, tmp_path, capsys):
    listed = variant("data", classes=NAMES)
    train(tiny_data, tmp_path / "old")  # as runs of earlier versions, which recorded none
    assert score(capsys, tmp_path / "old", f"--data_dir={listed}")["examples"] == 21
    assert runs.train(ALONE, listed, str(tmp_path / "old"), *runs.SHORT)["complete"]
    train(listed, tmp_path / "new")
    assert score(capsys, tmp_path / "new", f"--data_dir={tiny_data}")["examples"] == 21


def test_members_are_not_scored_on_other_classes(variant, tmp_path, capsys):
    run_dir = str(tmp_path / "run")
    runs.train(ALONE, variant("data", classes=NAMES), run_dir, *runs.TREE)
    other = variant("other", classes=NAMES[::-1])
    with pytest.raises(DataError, match="members/tail was trained on other classes: class 0 was digit 0"):
        evaluate.main([f"--run_dir={run_dir}", "--ensemble", f"--data_dir={other}"])


def test_data_that_have_moved_are_named_with_a_flag(variant, tmp_path, capsys):
    """Fault: the advice for a staged copy, evaluated on another node, was to prepare the data again."""
    folder = variant("data")
    train(folder, tmp_path / "run")
    os.rename(folder, f"{folder}_moved")
    with pytest.raises(DataError, match="the folder does not exist; .*; or name the data of the run with --data_dir"):
        score(capsys, tmp_path / "run")
    assert score(capsys, tmp_path / "run", f"--data_dir={folder}_moved")["examples"] == 21
