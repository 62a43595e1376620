"""Points of a run, given in epochs, as optimizer steps: one rule for harvest, swap and growth."""

import math

TIE = 1e-6  # of a step: products of fractions such as 3 * (1 / 6) fall this close to a tie, and count as one


def step_at(epochs: float, steps_per_epoch: int) -> int:
    """The optimizer step nearest to a number of epochs; halves round up."""
    return math.floor(epochs * steps_per_epoch + 0.5 + TIE)


def points_within(epochs: float, *, every: float, steps_per_epoch: int) -> list[int]:
    """Optimizer steps of the points at ``every``, ``2 * every``, ... epochs, up to and including ``epochs``.

    One step a point, 1 at the least. Several points may fall on one step. How many there are depends on the epochs
    alone, not on how they round.
    """
    count = math.floor(epochs / every + TIE)
    return [max(1, step_at(i * every, steps_per_epoch)) for i in range(1, count + 1)]
