"""The Collapsed Ensemble: the mean of its members' probabilities. numpy alone, from the predictions that were kept.

members/NAME/              weights.npz, manifest.json: published as soon as the member's phase ends
members/NAME/predictions/  predictions.npz, manifest.json: ids, labels and probabilities of the evaluation set
"""

import dataclasses
import itertools
import os
import sys
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from resnet_cpu.data import folders
from resnet_cpu.errors import CheckpointError, FlagError, NotFinite
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import read_json, read_record
from resnet_cpu.settings import Settings
from resnet_cpu.training import calibration

MOST_FOR_SUBSETS = 6  # members; more have too many subsets to score each on 50,000 x 1,000 probabilities


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of one network for the evaluation set: every example once, in the order of their ids."""

    ids: np.ndarray  # int64 [examples]
    labels: np.ndarray  # int64 [examples]
    probabilities: np.ndarray  # float32 [examples, classes], softmax


def evaluation_settings(settings: Settings) -> Dict[str, Any]:
    """Return the settings that decide which pixels a member is scored on, as the predictions' manifest holds them."""
    data = settings.data
    # Predictions of before --eval_split was a flag are those of auto.
    split = {} if data.eval_split == folders.AUTO else {"eval_split": data.eval_split}
    return {
        **split,
        "dataset": data.dataset,
        "data_dir": data.data_dir,
        "image_size": data.image_size,
        "resize": data.resize,
        "normalization": data.normalization,
        "eval_crop": data.eval_crop,
        "precision": settings.model.precision,
    }


def save(path: str, predictions: Optional[Predictions], settings: Settings, content: str) -> None:
    """Save the predictions of the member at `path`, with the digest of the weights that made them; rank 0 only.

    Args:
        content: digest of the shards with the evaluation images, `Split.content`.

    Raises NotFinite if the network has no finite outputs for some of the images.
    """
    assert predictions is not None
    manifest, finite = checkpoint.read_manifest(path), np.isfinite(predictions.probabilities).all(axis=1)
    if not finite.all():
        raise NotFinite(
            f"member {os.path.basename(path)}: its outputs are not finite for {len(finite) - finite.sum():,} of "
            f"{len(finite):,} evaluation images, though its weights are; train again in another --run_dir with a lower "
            "LR, or with a lower --bn_momentum, so that batch norm's moving averages follow the weights faster"
        )
    info = {
        "step": manifest["step"],
        "weights_sha256": checkpoint.weights_digest(manifest),
        "evaluated": evaluation_settings(settings),
        "content": content,
    }
    checkpoint.save(os.path.join(path, "predictions"), {"predictions": dataclasses.asdict(predictions)}, info)


def has_predictions(path: str, settings: Settings, same_folder: bool = False, content: Optional[str] = None) -> bool:
    """Return whether the member at `path` has undamaged predictions of its weights on the data of the settings.

    With `same_folder`, predictions made from another --data_dir do not count; with `content`, neither do those of
    other images, see `save`. Predictions of version 0.1 have no content.
    """
    weights = checkpoint.weights_digest(checkpoint.read_manifest(path))
    folder = os.path.join(path, "predictions")
    try:
        predictions = checkpoint.read_manifest(folder)
        checkpoint.load(folder, "predictions")
    except CheckpointError:
        return False
    made_with, now = dict(predictions.get("evaluated", {})), evaluation_settings(settings)
    if not same_folder:
        made_with["data_dir"] = now["data_dir"]
    if content is not None and predictions.get("content", content) != content:
        return False
    return predictions.get("weights_sha256") == weights and made_with == now


def load(path: str) -> Predictions:
    """Return the saved predictions of the member at `path`."""
    arrays = checkpoint.load(os.path.join(path, "predictions"), "predictions")
    return Predictions(arrays["ids"], arrays["labels"], arrays["probabilities"])


def report(members: Mapping[str, Predictions], beat: Callable[[], None] = lambda: None) -> Dict[str, Any]:
    """Return the scores of every member, every prefix and the ensemble, the best subset, and pairwise disagreement.

    Members, prefixes, last members and the best subset also have the scores after temperature scaling.

    The best subset is chosen on the same examples that it is scored on, so its score is optimistic. `beat` is called
    after each score.
    """
    check_comparable(members)
    names = list(members)
    labels = members[names[0]].labels
    scores: Dict[Tuple[str, ...], Dict[str, float]] = {}

    calibrations: Dict[Tuple[str, ...], Dict[str, float]] = {}

    def probabilities(chosen: Sequence[str]) -> List[np.ndarray]:
        return [members[name].probabilities for name in chosen]

    def score_of(*chosen: str) -> Dict[str, float]:
        if chosen not in scores:
            scores[chosen] = score(probabilities(chosen), labels)
            beat()
        return scores[chosen]

    def calibration_of(*chosen: str) -> Dict[str, float]:
        if chosen not in calibrations:
            calibrations[chosen] = calibration.scaled(probabilities(chosen), labels, beat)
        return calibrations[chosen]

    def row(chosen: Tuple[str, ...]) -> Dict[str, Any]:
        return {"members": list(chosen), **score_of(*chosen), **calibration_of(*chosen)}

    singles = {name: {**score_of(name), **calibration_of(name)} for name in names}
    prefixes = [tuple(names[:count]) for count in range(1, len(names) + 1)]
    subsets = prefixes
    if len(names) <= MOST_FOR_SUBSETS:
        subsets = [chosen for prefix in prefixes for chosen in itertools.combinations(names, len(prefix))]
    best = max(subsets, key=lambda chosen: (score_of(*chosen)["top1"], -len(chosen)))
    predicted = {name: np.argmax(member.probabilities, 1) for name, member in members.items()}
    return {
        "members": singles,
        "ensemble": {
            **row(prefixes[-1]),
            "examples": len(labels),
            "prefixes": [row(prefix) for prefix in prefixes],
            "last_m": [row(tuple(names[-count:])) for count in range(1, len(names) + 1)],
            "best_subset": row(best),
            "disagreement": {
                f"{one} vs {other}": float(np.mean(predicted[one] != predicted[other]))
                for one, other in itertools.combinations(names, 2)
            },
        },
    }


def check_comparable(members: Mapping[str, Predictions]) -> None:
    """Raise CheckpointError that names a member which was not evaluated on the same examples as the first."""
    (first, expected), *others = members.items()
    for name, member in others:
        difference = None
        if not np.array_equal(member.ids, expected.ids):
            difference = f"{len(member.ids)} evaluation examples, not the {len(expected.ids)} of {first}"
        elif member.probabilities.shape[1] != expected.probabilities.shape[1]:
            difference = (
                f"{member.probabilities.shape[1]} classes, not the {expected.probabilities.shape[1]} of {first}"
            )
        elif not np.array_equal(member.labels, expected.labels):
            difference = f"other labels than {first}"
        if difference is not None:
            raise CheckpointError(f"member {name} cannot be combined: it was evaluated on {difference}; leave it out")


def _check_contents(paths: Mapping[str, str]) -> None:
    """Raise CheckpointError for a member whose predictions are of other images than those before it."""
    known: Dict[str, str] = {}  # content -> name of the first member
    for name, path in paths.items():
        content = checkpoint.read_manifest(os.path.join(path, "predictions")).get("content")
        if content is not None and known and content not in known:
            first = next(iter(known.values()))
            raise CheckpointError(
                f"member {name} cannot be combined: it was evaluated on other images than {first}; remove the folders "
                "predictions of all these members and give --data_dir, so that all are evaluated on the same images"
            )
        if content is not None:
            known[content] = name


def score(probabilities: Sequence[np.ndarray], labels: np.ndarray) -> Dict[str, float]:
    """Return top-1, top-5, cross-entropy and calibration error (ECE) of the mean of `probabilities`.

    Each array is [examples, classes], `labels` [examples]. Of equal probabilities the first class counts, as in argmax.
    ECE: mean over examples of |accuracy - confidence| of their bin of confidence.
    """
    hits1, hits5, losses, confidences = [], [], [], []
    for part, mean in calibration.means(probabilities):
        truth = labels[part, None]
        own = np.take_along_axis(mean, truth, 1)
        before = (mean > own) | ((mean == own) & (np.arange(mean.shape[1]) < truth))
        rank = before.sum(1)
        hits1.append(rank < 1)
        hits5.append(rank < 5)
        losses.append(-np.log(np.maximum(own[:, 0], calibration.LEAST_PROBABILITY)))
        confidences.append(mean.max(1))
    hit, confidence = np.concatenate(hits1), np.concatenate(confidences)
    return {
        "top1": float(hit.mean()),
        "top5": float(np.concatenate(hits5).mean()),
        "loss": float(np.concatenate(losses).mean()),
        "ece": calibration.error(hit, confidence),
    }


def average_weights(paths: Sequence[str]) -> checkpoint.Arrays:
    """Return the mean of weights and statistics of the members at `paths`; raise CheckpointError if shapes differ.

    The averaged statistics are not batch norm's statistics of the averaged weights: a few steps at LR 0 recompute them.
    """
    sums: Dict[str, np.ndarray] = {}
    dtypes: Dict[str, np.dtype] = {}
    for path in paths:
        arrays = checkpoint.load(path, "weights")
        if sums and {name: array.shape for name, array in arrays.items()} != {n: a.shape for n, a in sums.items()}:
            raise CheckpointError(f"{path}: holds another network than {paths[0]}; only equal networks can be averaged")
        for name, array in arrays.items():
            sums[name] = sums.get(name, 0.0) + array.astype(np.float64)
            dtypes[name] = array.dtype
    return {name: (total / len(paths)).astype(dtypes[name]) for name, total in sums.items()}


def find(run_dir: str, names: Sequence[str]) -> List[str]:
    """Return the folders of the members `names` of a run; raise CheckpointError for a missing one."""
    paths = []
    for name in names:
        path = checkpoint.member_folder(run_dir, name)
        if not os.path.exists(os.path.join(path, checkpoint.MANIFEST)):
            raise CheckpointError(
                f"{run_dir}: member {name} is missing; train to the end of its phase or, if the run has ended, name "
                "the members that exist with --members"
            )
        paths.append(path)
    return paths


def _holds_weights(path: str) -> bool:
    """Return whether `path` is a member or another checkpoint; not a data set, and not the predictions of a member.

    Raises CheckpointError for a damaged one.
    """
    file = os.path.join(path, checkpoint.MANIFEST)
    content = read_json(file)
    if content is not None and not checkpoint.holds_weights(content):
        return False
    return os.path.exists(file) and bool(checkpoint.read_manifest(path))


def members_of(named: Sequence[str]) -> Dict[str, str]:
    """Return name -> folder of members, given folders of members and runs, which stand for all of their members.

    Members of several runs are named RUN/NAME. Raises CheckpointError for a missing member, FlagError for one that is
    named twice.
    """
    paths: List[str] = []
    for path in named:
        if not path:
            raise FlagError("--members: a name is empty; separate the names by single commas")
        if _holds_weights(path):
            paths.append(path)
            continue
        record = read_record(path)
        if record is None:
            problem = "neither a member nor a run" if os.path.exists(path) else "does not exist"
            raise CheckpointError(f"{path}: {problem}; name RUN/members/NAME or a run's folder")
        phases = record["signature"]["phases"]
        names = [name for name in record["signature"]["order_of_phases"] if phases[name].get("member")]
        if not names:
            raise CheckpointError(f"{path}: the recipe of this run has no members; mark phases with member=1")
        paths += find(path, names)
    real = [os.path.realpath(path) for path in paths]
    for path in real:
        if real.count(path) > 1:
            raise FlagError(f"--members: {path} is named twice; name each member once")
    names = [os.path.basename(path) for path in real]
    if len({os.path.dirname(path) for path in real}) > 1:
        names = [f"{os.path.basename(run_of(path))}/{name}" for path, name in zip(real, names)]
    if len(set(names)) < len(names):
        names = real
    return dict(zip(names, real))


def run_of(path: str) -> str:
    """Return the folder of the run that the member at `path` belongs to."""
    return os.path.dirname(os.path.dirname(path))


def evaluate(paths: Mapping[str, str], export_to: Optional[str]) -> Dict[str, Any]:
    """Return the report on the members `paths` (name -> folder); write the mean of their weights to `export_to`."""
    _check_contents(paths)
    found = report({name: load(path) for name, path in paths.items()})
    if export_to:
        checkpoint.write_weights(export_to, average_weights(list(paths.values())))
        print(
            f"--export={export_to}: the mean of the weights of {len(paths)} members; batch norm's statistics must be "
            "recomputed before use (docs/ensemble.md)",
            file=sys.stderr,
        )
        if len({run_of(path) for path in paths.values()}) > 1:
            print(
                "--export: the members belong to several runs; weights that were initialised separately have no "
                "useful mean",
                file=sys.stderr,
            )
    whole = found["ensemble"]
    return {**{key: whole[key] for key in ("examples", "top1", "top5", "loss", "ece")}, **found}
