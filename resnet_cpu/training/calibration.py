"""How far probabilities can be believed: the calibration error, and temperature scaling.

Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599.
"""

from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np

ECE_BINS = 15  # of equal width, as in the paper
LEAST_PROBABILITY = 1e-38  # stands for a probability that float32 rounded to zero, in the logarithm
_CHUNK = 4096  # examples at a time, to bound the memory of the means in float64
_LEAST, _MOST = 0.02, 50.0  # of the inverse temperature
_STEPS, _CLOSE = 30, 1e-6  # of Newton's method: the most, and the shortest relative to the temperature


def means(probabilities: Sequence[np.ndarray]) -> Iterator[Tuple[slice, np.ndarray]]:
    """Yield (examples, float64 mean of their `probabilities`) in parts; each array is [examples, classes]."""
    for start in range(0, len(probabilities[0]), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield part, np.mean([one[part].astype(np.float64) for one in probabilities], 0)


def error(hit: np.ndarray, confidence: np.ndarray) -> float:
    """Return the calibration error (ECE): the mean of |accuracy - confidence| of the bins, by number of examples."""
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(bins, hit - confidence, ECE_BINS)
    return float(np.abs(gaps).sum() / len(hit))


def scaled(
    probabilities: Sequence[np.ndarray], labels: np.ndarray, beat: Callable[[], None] = lambda: None
) -> Dict[str, float]:
    """Return the temperature of the mean of `probabilities`, and loss and calibration error after scaling by it.

    The temperature of one half of the examples, those at even positions, is fitted to the other half and the other
    way round, so that no example is scored with a temperature that was fitted to it; `temperature` is the mean of the
    two. Each array is [examples, classes], `labels` [examples]. `beat` is called after each pass over the examples.
    """
    temperatures, hits, confidences, losses = [], [], [], []
    for fold, fitted in ((0, 1), (1, 0)) if len(labels) > 1 else ((0, 0),):
        inverse = _fit([one[fitted::2] for one in probabilities], labels[fitted::2], beat)
        truth = labels[fold::2]
        for part, mean in means([one[fold::2] for one in probabilities]):
            shares = _softmax(inverse * _logarithm(mean))
            own = np.take_along_axis(shares, truth[part, None], 1)[:, 0]
            hits.append(shares.argmax(1) == truth[part])
            confidences.append(shares.max(1))
            losses.append(-np.log(np.maximum(own, LEAST_PROBABILITY)))
        temperatures.append(1 / inverse)
        beat()
    return {
        "temperature": float(np.mean(temperatures)),
        "loss_scaled": float(np.concatenate(losses).mean()),
        "ece_scaled": error(np.concatenate(hits), np.concatenate(confidences)),
    }


def _fit(probabilities: Sequence[np.ndarray], labels: np.ndarray, beat: Callable[[], None]) -> float:
    """Return the inverse temperature with the least cross-entropy, by Newton's method: the function is convex."""
    inverse = 1.0
    for _ in range(_STEPS):
        slopes: List[np.ndarray] = []
        curvatures: List[np.ndarray] = []
        for part, mean in means(probabilities):
            logits = _logarithm(mean)
            shares = _softmax(inverse * logits)
            expected = (shares * logits).sum(1)
            slopes.append(expected - np.take_along_axis(logits, labels[part, None], 1)[:, 0])
            curvatures.append((shares * (logits - expected[:, None]) ** 2).sum(1))
        beat()
        slope, curvature = np.concatenate(slopes).mean(), np.concatenate(curvatures).mean()
        # At most by a factor of two, because far from the minimum the curvature may be nearly zero.
        step = slope / curvature if curvature > 0 else np.sign(slope) * inverse
        before, inverse = inverse, float(np.clip(inverse - step, inverse / 2, inverse * 2))
        inverse = float(np.clip(inverse, _LEAST, _MOST))
        if abs(inverse - before) < _CLOSE * before:
            break
    return inverse


def _logarithm(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, LEAST_PROBABILITY))


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)
