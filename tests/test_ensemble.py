"""The ensemble's arithmetic against plain numpy, and its invariances."""

import dataclasses

import numpy as np
import pytest
import whole_runs as runs
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_cpu import commandline
from resnet_cpu.cluster.control import World
from resnet_cpu.data import folders
from resnet_cpu.errors import CheckpointError, FlagError, NotFinite
from resnet_cpu.run import checkpoint
from resnet_cpu.training import ensemble, evaluation
from resnet_cpu.training.ensemble import Predictions
from resnet_cpu.training.state import build_model

EXAMPLES, CLASSES = 300, 7


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return (exponentials / exponentials.sum(1, keepdims=True)).astype(np.float32)


def some(seed, labels_seed=0, examples=EXAMPLES, sharpness=2.0):
    labels = np.random.Generator(np.random.Philox(labels_seed)).integers(0, CLASSES, examples)
    logits = np.random.Generator(np.random.Philox([1, seed])).standard_normal([examples, CLASSES])
    logits[np.arange(examples), labels] += 1
    return Predictions(np.arange(examples), labels, softmax(sharpness * logits))


def test_copies_of_one_model_are_that_model():
    one = some(1)
    report = ensemble.report({name: one for name in "abcd"})
    alone = ensemble.score([one.probabilities], one.labels)
    for scores in (report["ensemble"], *report["members"].values(), *report["ensemble"]["prefixes"]):
        assert {key: scores[key] for key in alone} == pytest.approx(alone, rel=1e-12)
    assert set(report["ensemble"]["disagreement"].values()) == {0.0}
    assert report["ensemble"]["best_subset"]["members"] == ["a"]  # of equal ones the smallest


def test_order_of_members_does_not_matter():
    members = {name: some(number) for number, name in enumerate("abc")}
    forward = ensemble.report(members)
    backward = ensemble.report({name: members[name] for name in "cba"})
    assert forward["members"] == backward["members"]
    for key in ("top1", "top5", "loss", "ece"):
        assert forward["ensemble"][key] == pytest.approx(backward["ensemble"][key], rel=1e-12)
        assert forward["ensemble"]["best_subset"][key] == pytest.approx(backward["ensemble"]["best_subset"][key])


def test_scores_equal_numpy():
    members = [some(number) for number in range(3)]
    mean = np.mean([one.probabilities.astype(np.float64) for one in members], 0)
    labels = members[0].labels
    scores = ensemble.report({str(number): one for number, one in enumerate(members)})["ensemble"]
    assert scores["top1"] == (mean.argmax(1) == labels).mean()
    order = np.argsort(-mean, axis=1, kind="stable")
    assert scores["top5"] == (order[:, :5] == labels[:, None]).any(1).mean()
    assert scores["loss"] == pytest.approx(-np.log(mean[np.arange(EXAMPLES), labels]).mean(), rel=1e-12)
    assert scores["disagreement"]["0 vs 2"] == np.mean(
        members[0].probabilities.argmax(1) != members[2].probabilities.argmax(1)
    )
    expected = 0.0  # the definition, bin by bin
    confidence, hit = mean.max(1), mean.argmax(1) == labels
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    assert scores["ece"] == pytest.approx(expected, abs=1e-12)


def test_the_mean_is_of_probabilities_not_of_logits():
    """A confident member outvotes an unsure one: control against averaging logits of different scales."""
    labels = np.array([0])
    sure, unsure = np.array([[0.9, 0.1]], np.float32), np.array([[0.3, 0.7]], np.float32)
    assert ensemble.score([sure, unsure], labels)["loss"] == pytest.approx(-np.log(0.6), rel=1e-6)


def test_calibration_error_of_the_perfect_and_of_the_overconfident():
    labels = np.arange(100) % 10
    certain = np.eye(10, dtype=np.float32)
    assert ensemble.score([certain[labels]], labels)["ece"] == 0
    wrong = ensemble.score([certain[(labels + 1) % 10]], labels)
    assert wrong["ece"] == 1 and wrong["top1"] == 0 and np.isfinite(wrong["loss"])


def test_the_best_subset_is_found():
    labels = some(0).labels
    good = [some(number, sharpness=2.0) for number in (1, 2)]
    spoilt = Predictions(good[0].ids, labels, softmax(-50 * np.eye(CLASSES)[labels]))
    found = ensemble.report({"good": good[0], "spoilt": spoilt, "fine": good[1]})["ensemble"]
    assert "spoilt" not in found["best_subset"]["members"]
    assert found["best_subset"]["top1"] >= max(found["top1"], *(p["top1"] for p in found["prefixes"]))
    assert [row["members"] for row in found["last_m"]] == [["fine"], ["spoilt", "fine"], ["good", "spoilt", "fine"]]
    assert found["last_m"][-1]["top1"] == found["top1"]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9000), st.integers(0, 5))
def test_scores_do_not_depend_on_chunks(examples, seed):
    one = some(seed, labels_seed=seed, examples=examples)
    scores = ensemble.score([one.probabilities, some(seed + 1, seed, examples).probabilities], one.labels)
    mean = (one.probabilities.astype(np.float64) + some(seed + 1, seed, examples).probabilities) / 2
    assert scores["top1"] == (mean.argmax(1) == one.labels).mean()


@pytest.mark.parametrize(
    "other, part",
    [
        (some(1, examples=299), "299 evaluation examples, not the 300 of a"),
        (some(1, labels_seed=9), "other labels than a"),
        (
            Predictions(some(1).ids, some(1).labels, np.full([EXAMPLES, 9], 1 / 9, np.float32)),
            "9 classes, not the 7 of a",
        ),
    ],
)
def test_a_member_that_cannot_be_combined_is_named(other, part):
    with pytest.raises(CheckpointError, match=part) as caught:
        ensemble.report({"a": some(1), "stranger": other})
    assert "member stranger cannot be combined" in str(caught.value) and caught.value.exit_code == 66


@pytest.mark.training
def test_predictions_are_those_of_the_network_in_the_order_of_the_examples(tiny_data):
    config = commandline.parse([*runs.TINY_FLAGS, "--seed=5", "--eval_batch_size=8"])
    model, data = build_model(config), folders.open_data(tiny_data, "digits")
    step = evaluation.make_evaluate_step(model)
    score, found = evaluation.predict(step, config, World(1, 0), data, 8, lambda: None)
    assert found.ids.tolist() == list(range(21)) and found.probabilities.shape == (21, 10)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)
    again = ensemble.score([found.probabilities], found.labels)
    assert (again["top1"], again["top5"]) == (score.top1, score.top5)
    assert again["loss"] == pytest.approx(score.loss, rel=1e-5)


def test_what_is_not_a_member_is_named_with_the_cause(tmp_path):
    run = tmp_path / "run"
    checkpoint.save(f"{run}/members/tail", {"weights": {"w": np.zeros(2)}}, {"step": 1, "signature": {}})
    checkpoint.save(f"{run}/members/tail/predictions", {"predictions": {"p": np.zeros(2)}}, {"step": 1})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"dataset": "digits", "splits": {}}')
    assert ensemble.members_of([f"{run}/members/tail"]) == {"tail": f"{run}/members/tail"}
    for path in ("data", "run/members/tail/predictions", "run/members"):
        with pytest.raises(CheckpointError, match=f"{path}: neither a member nor a run; name RUN/members/NAME"):
            ensemble.members_of([str(tmp_path / path)])
    with pytest.raises(CheckpointError, match="none: does not exist"):
        ensemble.members_of([str(tmp_path / "none")])
    with pytest.raises(FlagError, match="--members: a name is empty"):
        ensemble.members_of([f"{run}/members/tail", ""])
    (run / "members" / "tail" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="tail/manifest.json: damaged"):
        ensemble.members_of([f"{run}/members/tail"])


def member(folder, name, content):
    """Write a member with predictions of images whose shards have the digest `content`."""
    path = str(folder / name)
    info = {"step": 1, "signature": {}, "phase": name}
    checkpoint.save(path, {"weights": {"w": np.ones(2, np.float32)}}, info)
    ensemble.save(path, some(len(name)), commandline.parse(runs.TINY_FLAGS), content)
    return path


def test_a_member_whose_outputs_are_not_finite_is_an_error_with_a_remedy(tmp_path):
    """Fault: its probabilities were said to be not finite after a step of which nothing had been saved."""
    path, predictions = member(tmp_path, "one", "content"), some(3)
    probabilities = predictions.probabilities.copy()
    probabilities[0] = np.nan
    bad = dataclasses.replace(predictions, probabilities=probabilities)
    with pytest.raises(NotFinite, match="member one: .* for 1 of .* evaluation images, though its weights are"):
        ensemble.save(path, bad, commandline.parse(runs.TINY_FLAGS), "content")


def test_predictions_of_other_images_do_not_count(tmp_path):
    """As when the evaluation shards were replaced between two attempts, with the same number of images and labels."""
    path, config = member(tmp_path, "one", "before"), commandline.parse(runs.TINY_FLAGS)
    assert ensemble.has_predictions(path, config) and ensemble.has_predictions(path, config, content="before")
    assert not ensemble.has_predictions(path, config, content="after")
    paths = {"one": path, "other": member(tmp_path, "other", "after")}
    with pytest.raises(
        CheckpointError, match="member other cannot .* other images than one; remove the folders predict"
    ):
        ensemble.evaluate(paths, None)
    assert "top1" in ensemble.evaluate({**paths, "other": member(tmp_path, "other", "before")}, None)
