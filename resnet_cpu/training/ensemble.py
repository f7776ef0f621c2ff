"""The Collapsed Ensemble: the mean of what its members say of each example. numpy alone, from cached predictions.

members/NAME/  weights.npz manifest.json          saved as soon as the member's phase ends
members/NAME/predictions/  predictions.npz        ids, labels and probabilities of the evaluation set
"""

import dataclasses
import itertools
import os
import sys
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from resnet_cpu.errors import CheckpointError, FlagError
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import read_json
from resnet_cpu.settings import Settings

ECE_BINS = 15  # of equal width, as in Guo et al., arXiv 1706.04599
MOST_FOR_SUBSETS = 6  # members; more have too many subsets to try them all on 50,000 x 1,000 probabilities
_LEAST = 1e-38  # a probability that float32 rounded to zero is taken for this in the logarithm
_CHUNK = 4096  # examples at a time: bounds the memory of the means in float64


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What one network says of the evaluation set: every example once, in the order of their ids."""

    ids: np.ndarray  # int64 [examples]
    labels: np.ndarray  # int64 [examples]
    probabilities: np.ndarray  # float32 [examples, classes], softmax


def evaluated(settings: Settings) -> Dict[str, Any]:
    """Return all of the settings that decides on what pixels a member is scored."""
    data = settings.data
    return {
        "dataset": data.dataset,
        "data_dir": data.data_dir,
        "image_size": data.image_size,
        "resize": data.resize,
        "normalization": data.normalization,
        "eval_crop": data.eval_crop,
        "precision": settings.model.precision,
    }


def save(path: str, predictions: Optional[Predictions], settings: Settings) -> None:
    """Keep the predictions of the member at `path`, with the digest of the weights that made them."""
    assert predictions is not None  # only rank 0 saves
    manifest = checkpoint.read_manifest(path)
    info = {
        "step": manifest["step"],
        "weights_sha256": manifest["files"]["weights.npz"]["sha256"],
        "evaluated": evaluated(settings),
    }
    checkpoint.save(os.path.join(path, "predictions"), {"predictions": dataclasses.asdict(predictions)}, info)


def is_kept(path: str, settings: Settings, wherever: bool = True) -> bool:
    """Return whether the member at `path` has whole predictions of these very weights on what the settings evaluate.

    `wherever`: the same data set may lie in another folder than it did.
    """
    manifest = checkpoint.read_manifest(path)
    folder = os.path.join(path, "predictions")
    try:
        about = checkpoint.read_manifest(folder)
        checkpoint.load(folder, "predictions")
    except CheckpointError:
        return False
    then, now = dict(about.get("evaluated", {})), evaluated(settings)
    if wherever:
        then["data_dir"] = now["data_dir"]
    return about.get("weights_sha256") == manifest["files"]["weights.npz"]["sha256"] and then == now


def load(path: str) -> Predictions:
    """Return the cached predictions of the member at `path`."""
    arrays = checkpoint.load(os.path.join(path, "predictions"), "predictions")
    return Predictions(arrays["ids"], arrays["labels"], arrays["probabilities"])


def report(members: Mapping[str, Predictions], beat: Callable[[], None] = lambda: None) -> Dict[str, Any]:
    """Return the scores of every member, every prefix and the ensemble, the best subset, and who disagrees with whom.

    The best subset is chosen on the very examples it is scored on, so its score flatters. `beat` follows each score.
    """
    check_alike(members)
    names, everyone = list(members), list(members.values())
    labels = everyone[0].labels
    scores: Dict[Tuple[str, ...], Dict[str, float]] = {}

    def of(*chosen: str) -> Dict[str, float]:
        if chosen not in scores:
            scores[chosen] = score([members[name].probabilities for name in chosen], labels)
            beat()
        return scores[chosen]

    singles = {name: of(name) for name in names}
    prefixes = [tuple(names[:count]) for count in range(1, len(names) + 1)]
    subsets = prefixes
    if len(names) <= MOST_FOR_SUBSETS:
        subsets = [chosen for prefix in prefixes for chosen in itertools.combinations(names, len(prefix))]
    best = max(subsets, key=lambda chosen: (of(*chosen)["top1"], -len(chosen)))
    said = {name: np.argmax(one.probabilities, 1) for name, one in members.items()}

    def told(chosen: Tuple[str, ...]) -> Dict[str, Any]:
        return {"members": list(chosen), **of(*chosen)}

    return {
        "members": singles,
        "ensemble": {
            **told(prefixes[-1]),
            "examples": len(labels),
            "prefixes": [told(prefix) for prefix in prefixes],
            "best_subset": told(best),
            "disagreement": {
                f"{one} vs {other}": float(np.mean(said[one] != said[other]))
                for one, other in itertools.combinations(names, 2)
            },
        },
    }


def check_alike(members: Mapping[str, Predictions]) -> None:
    """Raise CheckpointError that names the member which was not scored on the same examples as the first."""
    (first, expected), *others = members.items()
    for name, one in others:
        what = None
        if not np.array_equal(one.ids, expected.ids):
            what = f"{len(one.ids)} evaluation examples, not the {len(expected.ids)} of {first}"
        elif one.probabilities.shape[1] != expected.probabilities.shape[1]:
            what = f"{one.probabilities.shape[1]} classes, not the {expected.probabilities.shape[1]} of {first}"
        elif not np.array_equal(one.labels, expected.labels):
            what = f"other labels than {first}"
        if what is not None:
            raise CheckpointError(f"member {name} is foreign: it was scored on {what}; leave it out")


def score(probabilities: Sequence[np.ndarray], labels: np.ndarray) -> Dict[str, float]:
    """Return top-1, top-5, cross-entropy and calibration error of the mean of `probabilities` [examples, classes] each.

    Of equal probabilities the first class counts, as in argmax. ECE: mean over examples of |accuracy - confidence| of
    their bin of confidence.
    """
    hits1, hits5, losses, confidences = [], [], [], []
    for start in range(0, len(labels), _CHUNK):
        part = slice(start, start + _CHUNK)
        mean = np.mean([one[part].astype(np.float64) for one in probabilities], 0)
        truth = labels[part, None]
        own = np.take_along_axis(mean, truth, 1)
        before = (mean > own) | ((mean == own) & (np.arange(mean.shape[1]) < truth))
        rank = before.sum(1)
        hits1.append(rank < 1)
        hits5.append(rank < 5)
        losses.append(-np.log(np.maximum(own[:, 0], _LEAST)))
        confidences.append(mean.max(1))
    hit, confidence = np.concatenate(hits1), np.concatenate(confidences)
    return {
        "top1": float(hit.mean()),
        "top5": float(np.concatenate(hits5).mean()),
        "loss": float(np.concatenate(losses).mean()),
        "ece": _calibration_error(hit, confidence),
    }


def _calibration_error(hit: np.ndarray, confidence: np.ndarray) -> float:
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(bins, hit - confidence, ECE_BINS)
    return float(np.abs(gaps).sum() / len(hit))


def average_weights(paths: Sequence[str]) -> checkpoint.Arrays:
    """Return the mean of weights and statistics of the members at `paths`; raise CheckpointError if they do not fit.

    Batch norm's statistics of averaged weights are not the averaged statistics: a few steps at LR 0 set them right.
    """
    sums: Dict[str, np.ndarray] = {}
    dtypes: Dict[str, np.dtype] = {}
    for path in paths:
        arrays = checkpoint.load(path, "weights")
        if sums and {name: array.shape for name, array in arrays.items()} != {n: a.shape for n, a in sums.items()}:
            raise CheckpointError(f"{path}: is another network than {paths[0]}; only like weights can be averaged")
        for name, array in arrays.items():
            sums[name] = sums.get(name, 0.0) + array.astype(np.float64)
            dtypes[name] = array.dtype
    return {name: (total / len(paths)).astype(dtypes[name]) for name, total in sums.items()}


def find(run_dir: str, names: Sequence[str]) -> List[str]:
    """Return the folders of the members `names` of a run; raise CheckpointError for one that is not there."""
    paths = []
    for name in names:
        path = checkpoint.member_folder(run_dir, name)
        if not os.path.exists(os.path.join(path, checkpoint.MANIFEST)):
            raise CheckpointError(
                f"{run_dir}: member {name} is missing; run the training to the end of its phase or, if it has ended, "
                "name those that are there with --members"
            )
        paths.append(path)
    return paths


def paths_of(named: Sequence[str]) -> Dict[str, str]:
    """Return name -> folder of the members that `named` stands for: folders of members, and runs for all of theirs.

    Members of several runs are named RUN/NAME. Raises CheckpointError for a missing one, FlagError for one named twice.
    """
    paths: List[str] = []
    for path in named:
        if os.path.exists(os.path.join(path, checkpoint.MANIFEST)):
            paths.append(path)
            continue
        record = read_json(os.path.join(path, "run.json"))
        if record is None:
            raise CheckpointError(f"{path}: neither a member nor a run; name RUN/members/NAME or a run's folder")
        phases = record["signature"]["phases"]
        names = [name for name in record["signature"]["order_of_phases"] if phases[name]["member"]]
        if not names:
            raise CheckpointError(f"{path}: the recipe of this run has no members; mark phases with member=1")
        paths += find(path, names)
    real = [os.path.realpath(path) for path in paths]
    for path in real:
        if real.count(path) > 1:
            raise FlagError(f"--members: {path} is named twice; a member counts once")
    names = [os.path.basename(path) for path in real]
    if len({os.path.dirname(path) for path in real}) > 1:
        names = [f"{os.path.basename(run_of(path))}/{name}" for path, name in zip(real, names)]
    if len(set(names)) < len(names):
        names = real
    return dict(zip(names, real))


def run_of(path: str) -> str:
    """Return the folder of the run that the member at `path` belongs to."""
    return os.path.dirname(os.path.dirname(path))


def signature_of(path: str) -> Dict[str, Any]:
    """Return what the member at `path` was trained with."""
    return checkpoint.read_manifest(path)["signature"]


def evaluate(paths: Mapping[str, str], export_to: Optional[str]) -> Dict[str, Any]:
    """Return the report on the members `paths` (name -> folder); write the mean of their weights where asked for."""
    found = report({name: load(path) for name, path in paths.items()})
    if export_to:
        checkpoint.write_weights(export_to, average_weights(list(paths.values())))
        print(
            f"--export={export_to}: the mean of {len(paths)} members' weights; batch norm's statistics still have to "
            "be taken anew (docs/ensemble.md)",
            file=sys.stderr,
        )
        if len({run_of(path) for path in paths.values()}) > 1:
            print(
                "--export: the members are of several runs; weights that were initialised apart have no useful mean",
                file=sys.stderr,
            )
    whole = found["ensemble"]
    return {**{key: whole[key] for key in ("examples", "top1", "top5", "loss", "ece")}, **found}
