"""Epochs as optimizer steps: no harvest is lost to rounding, for any length of an epoch."""

from fractions import Fraction

import pytest

from upit.core.points import points_within, step_at

LENGTHS = range(1, 501)


@pytest.mark.parametrize("epochs", ["0.5", "0.75", "1.25", "1.5", "2", "1/3", "5/6", "2.7"])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 7, 10])
def test_a_point_at_the_end_of_the_dense_phase_is_at_the_swap_for_every_length_of_an_epoch(epochs, parts):
    end = float(Fraction(epochs))
    every = float(Fraction(epochs) / parts)
    for steps in LENGTHS:
        points = points_within(end, every=every, steps_per_epoch=steps)
        assert len(points) == parts, steps
        assert points[-1] == max(1, step_at(end, steps)), steps
        assert points == sorted(points)


@pytest.mark.parametrize(
    ("epochs", "every", "count"),
    [(0.75, 0.25, 3), (1.5, 0.375, 4), (0.5, 0.3, 1), (1.25, 0.5, 2), (1.5, 0.1, 15), (1, 0.34, 2), (2, 1 / 3, 6)],
)
def test_as_many_points_as_the_settings_ask_for_whatever_the_length_of_an_epoch(epochs, every, count):
    for steps in LENGTHS:
        assert len(points_within(epochs, every=every, steps_per_epoch=steps)) == count, steps


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "step"),
    [(0.5, 5, 3), (0.5, 61, 31), (1.5, 61, 92), (0.375, 4, 2), (0.5, 4, 2), (3 * (1 / 6), 61, 31), (0.49, 50, 25)],
)
def test_halves_round_up(epochs, steps_per_epoch, step):
    assert step_at(epochs, steps_per_epoch) == step


def test_a_step_given_as_epochs_is_that_step():
    for steps in LENGTHS:
        assert all(step_at(step / steps, steps) == step for step in range(1, 1000, 7))
