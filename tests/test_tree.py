"""Runs with branches and members: phases start where the recipe says, and runs survive being cut off anywhere."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import whole_runs as runs
from conftest import last_line

from resnet_cpu.cluster import control, horovod
from resnet_cpu.errors import CheckpointError
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import read_rows

pytestmark = pytest.mark.training

ALONE = control.World(1, 0)


@pytest.fixture(scope="module")
def tree(tiny_data, tmp_path_factory):
    """The folder of a finished ensemble's run, not to be changed, which also counts how often states are hashed."""
    folder = tmp_path_factory.mktemp("tree") / "run"
    hashed = []
    with mock.patch.object(horovod, "check_replicas", lambda world, variables, when: hashed.append(when)):
        runs.train(ALONE, tiny_data, str(folder), *runs.TREE, draw=True)
    # A member, its checkpoint and its evaluation share one hash.
    ends = ["after step 6", "at the end of tail", "after step 15", "at the end of collapse"]
    assert hashed == ["before step 0", *ends]
    return folder


def test_members_of_a_run_that_was_cut_off_are_the_same_bits(tiny_data, tree, tmp_path):
    runs.check_tree(ALONE, tiny_data, str(tmp_path), whole=str(tree))


def test_a_branch_leaves_no_trace_on_the_main_line(tiny_data, tree, tmp_path):
    """`cycle` starts from `main`, not from the branch that ran in between, whatever that branch did."""
    run_dir = str(tmp_path / "run")
    wild = "--phase=tail:steps=3,lr=0.5,momentum=0.5,wd=0,branch=1,member=1"
    runs.train(ALONE, tiny_data, run_dir, *runs.TREE, wild)
    differing = runs.differing(runs.members(run_dir), runs.members(str(tree)))
    assert differing and all(name.startswith("tail/") for name in differing)


def test_negative_control_on_the_main_line_it_leaves_a_trace(tiny_data, tree, tmp_path):
    run_dir = str(tmp_path / "run")
    runs.train(
        ALONE, tiny_data, run_dir, *runs.TREE, "--phase=tail:steps=3,lr=0.02,power=2,wd=2e-4,augment=light,member=1"
    )
    assert any(name.startswith("collapse/") for name in runs.differing(runs.members(run_dir), runs.members(str(tree))))


def test_from_names_the_phase_to_start_from(tiny_data, tmp_path):
    """A phase that skips another: its weights are those of a main line that stood still meanwhile."""
    main, late = "--phase=main:steps=3,lr=0.05", "--phase=late:steps=2,lr=0.01,from=main,velocity=reset"
    found = []
    for name, between in (("over", "lr=0.05"), ("still", "lr=0,wd=0,momentum=0")):
        run_dir = str(tmp_path / name)
        runs.train(ALONE, tiny_data, run_dir, *runs.SYNTHETIC, main, f"--phase=tail:steps=2,{between}", late)
        found.append(checkpoint.load(checkpoint.folder(run_dir, 7), "weights"))
    trained = [name for name in found[0] if "moving" not in name]  # statistics move even if weights stand still
    assert all(found[0][name].tobytes() == found[1][name].tobytes() for name in trained)


OFTEN = ["--checkpoint_every_steps=1", "--keep_checkpoints=2"]


@pytest.fixture(scope="module")
def after_the_branch(tiny_data, tmp_path_factory):
    """The folder of an ensemble's run that was stopped at the end of its first branch, to be copied."""
    folder = tmp_path_factory.mktemp("branch") / "run"
    runs.train(ALONE, tiny_data, str(folder), *runs.TREE, *OFTEN, "--max_steps=9")
    return folder


def test_end_states_are_kept_until_no_later_phase_needs_them(tiny_data, after_the_branch, tmp_path):
    run_dir = str(shutil.copytree(after_the_branch, tmp_path / "run"))
    assert checkpoint.steps(run_dir) == [6, 8, 9]
    runs.train(ALONE, tiny_data, run_dir, *runs.TREE, *OFTEN, "--max_steps=11")
    assert checkpoint.steps(run_dir) == [10, 11]


def test_predictions_made_with_other_flags_are_made_again_at_the_end(tiny_data, tree, after_the_branch, tmp_path):
    run_dir = str(shutil.copytree(after_the_branch, tmp_path / "run"))
    path = str(tmp_path / "run" / "members" / "tail" / "predictions")
    kept = checkpoint.load(path, "predictions")
    info = {key: value for key, value in checkpoint.read_manifest(path).items() if key != "files"}
    info["evaluated"]["eval_crop"] = 0.5
    checkpoint.save(path, {"predictions": {**kept, "probabilities": kept["probabilities"][::-1]}}, info)
    result = runs.train(ALONE, tiny_data, run_dir, *runs.TREE)
    expected = json.loads((tree / "result.json").read_text())
    assert result["members"]["tail"] == pytest.approx(expected["members"]["tail"], rel=1e-6)
    assert result["ensemble"]["top1"] == expected["ensemble"]["top1"]


def test_a_missing_end_state_is_named(tiny_data, after_the_branch, tmp_path):
    run_dir = str(shutil.copytree(after_the_branch, tmp_path / "run"))
    shutil.rmtree(checkpoint.folder(run_dir, 6))
    with pytest.raises(CheckpointError, match="step-00000006"):
        runs.train(ALONE, tiny_data, run_dir, *runs.TREE)


def test_result_and_rows_hold_members_ensemble_and_phases(tree):
    result = json.loads((tree / "result.json").read_text())
    assert (tree / "plots" / "ensemble.png").read_bytes().startswith(b"\x89PNG")
    assert result["experiment"] == "collapsed_ensemble" and result["ensemble"]["members"] == ["tail", "collapse"]
    for scores in (*result["members"].values(), result["ensemble"], result["ensemble"]["best_subset"]):
        assert 0 <= scores["top1"] <= scores["top5"] <= 1 and scores["loss"] > 0 and 0 <= scores["ece"] <= 1
    assert result["top1"] == result["members"]["collapse"]["top1"]  # the last phase's
    rows = read_rows(str(tree / "eval.jsonl"))
    assert {row["end_of"]: row["step"] for row in rows if row["end_of"]} == {"tail": 8, "collapse": 17}
    assert [row["top1"] for row in rows if row["end_of"] == "tail"] == [result["members"]["tail"]["top1"]]
    assert result["members"]["collapse"]["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_an_ensemble_is_scored_from_saved_predictions(tree, run_command):
    result = json.loads((tree / "result.json").read_text())
    process = run_command("evaluate", "--ensemble", f"--run_dir={tree}")
    scores = json.loads(last_line(process.stdout))
    assert scores["ensemble"] == result["ensemble"] and scores["members"] == result["members"]
    assert scores["top1"] == result["ensemble"]["top1"] and scores["examples"] == 21


def test_members_without_predictions_are_evaluated_again(tree, tmp_path, run_command):
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy)
    for member in ("tail", "collapse"):  # of one data set, which is opened once
        (copy / "members" / member / "predictions" / "predictions.npz").write_bytes(b"damaged")
    more = [f"--members={copy},{tree}/members/collapse", f"--export={tmp_path}/mean.npz"]
    process = run_command("evaluate", "--ensemble", *more)
    assert process.returncode == 0, process.stderr
    scores = json.loads(last_line(process.stdout))
    assert list(scores["members"]) == ["copy/tail", "copy/collapse", "run/collapse"]
    kept = json.loads((tree / "result.json").read_text())["members"]
    for member in ("tail", "collapse"):
        assert scores["members"][f"copy/{member}"] == pytest.approx(kept[member], rel=1e-6)
    with np.load(tmp_path / "mean.npz") as mean:
        tail = checkpoint.load(str(tree / "members" / "tail"), "weights")["logits/kernel:0"].astype(np.float64)
        last = checkpoint.load(str(tree / "members" / "collapse"), "weights")["logits/kernel:0"]
        np.testing.assert_allclose(mean["logits/kernel:0"], (tail + 2 * last) / 3, rtol=1e-5, atol=1e-7)


def test_predictions_are_not_a_checkpoint(tree):
    from resnet_cpu import evaluate

    with pytest.raises(CheckpointError, match="holds no weights; name a checkpoint or a member"):
        evaluate.main([f"--run_dir={tree}", f"--checkpoint={tree}/members/tail/predictions"])


@pytest.mark.parametrize(
    "arguments, code, part",
    [
        (["--run_dir={gone}"], 66, "member tail is missing"),
        (["--members={tree}/members/nobody"], 66, "does not exist"),
        (["--members={tree},{tree}/members/tail"], 64, "named twice"),
        (["--members={tree},{mixed}"], 66, "mixed/tail cannot be combined"),
        (["--run_dir={tree}", "--padding=same"], 66, "padding: symmetric recorded, same now"),
        (["--run_dir={tree}", "--members={tree}"], 64, "contradicts --members"),
        (["--run_dir={tree}", "--export=/no/such/x.npz"], 64, "folder /no/such does not exist"),
        (["--run_dir={tree}", "--checkpoint=x"], 64, "contradicts --ensemble"),
        (["--run_dir={tree}", "--export=folder"], 64, ".npz"),
        ([], 64, "--run_dir is missing"),
    ],
)
def test_a_missing_or_different_member_is_named(tree, tmp_path, capsys, arguments, code, part):
    from resnet_cpu import evaluate
    from resnet_cpu.errors import UserError

    places = {"tree": tree, "gone": tmp_path / "gone", "mixed": tmp_path / "mixed"}
    for name in ("gone", "mixed"):
        shutil.copytree(tree, places[name])
    shutil.rmtree(places["gone"] / "members" / "tail")
    path = str(places["mixed"] / "members" / "tail" / "predictions")
    kept = checkpoint.load(path, "predictions")
    info = {key: value for key, value in checkpoint.read_manifest(path).items() if key != "files"}
    checkpoint.save(path, {"predictions": {**kept, "labels": kept["labels"] ^ 1}}, info)
    with pytest.raises(UserError, match=part) as caught:
        evaluate.main(["--ensemble", *(argument.format(**places) for argument in arguments)])
    assert caught.value.exit_code == code and "\n" not in str(caught.value)
