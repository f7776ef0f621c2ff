"""Temperature scaling: known temperatures, the minimum found by a grid, and halves that are scored by the other one."""

import numpy as np
import pytest

from resnet_cpu.training import calibration, ensemble


def softmax(logits):
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def drawn(examples=20_000, classes=10, seed=0):
    """Return logits, and labels drawn from their softmax: perfectly calibrated."""
    generator = np.random.Generator(np.random.Philox(seed))
    logits = 2 * generator.standard_normal([examples, classes])
    chances = softmax(logits).cumsum(1)
    return logits, np.minimum((generator.random([examples, 1]) > chances).sum(1), classes - 1)


@pytest.mark.parametrize("sharpened", [0.25, 1.0, 3.0])
def test_a_known_temperature_is_found(sharpened):
    logits, labels = drawn()
    probabilities = softmax(sharpened * logits).astype(np.float32)
    before, after = ensemble.score([probabilities], labels), calibration.scaled([probabilities], labels)
    assert after["temperature"] == pytest.approx(sharpened, rel=0.03)
    calibrated = ensemble.score([softmax(logits)], labels)
    assert after["loss_scaled"] == pytest.approx(calibrated["loss"], rel=2e-3)
    assert after["ece_scaled"] < 0.015
    if sharpened != 1:
        assert after["loss_scaled"] < before["loss"] - 0.05 and before["ece"] > 0.05


def test_the_loss_is_the_least_of_all_temperatures():
    """Both halves are alike, so that the fit to one is the fit to the other."""
    logits, labels = drawn(500, 7, 3)
    probabilities, labels = np.repeat(softmax(2 * logits), 2, axis=0), np.repeat(labels, 2)
    found = calibration.scaled([probabilities], labels)
    grid = [ensemble.score([softmax(inverse * np.log(probabilities))], labels)["loss"] for inverse in
            np.linspace(0.2, 1.5, 1301)]  # fmt: skip
    assert found["loss_scaled"] == pytest.approx(min(grid), abs=1e-6)
    assert 1 / found["temperature"] == pytest.approx(0.2 + 1.3 * np.argmin(grid) / 1300, abs=1e-3)


def test_no_example_is_scored_with_a_temperature_that_was_fitted_to_it():
    logits, labels = drawn()
    apart = np.where(np.arange(len(labels))[:, None] % 2, 3 * logits, logits)
    found = calibration.scaled([softmax(apart)], labels)
    assert found["loss_scaled"] > ensemble.score([softmax(apart)], labels)["loss"]


def test_right_and_wrong_certainties_have_a_finite_temperature():
    certain = np.eye(4)[[0, 1, 2, 3, 0, 1]]
    right, wrong = np.array([0, 1, 2, 3, 0, 1]), np.array([1, 2, 3, 0, 1, 2])
    for labels in (right, wrong):
        assert all(np.isfinite(value) for value in calibration.scaled([certain], labels).values())
    assert calibration.scaled([certain[:1]], right[:1])["loss_scaled"] == pytest.approx(0, abs=1e-6)
