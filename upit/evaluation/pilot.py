"""Are the checkpoints specialists? Score each on the held-out domains (arXiv:2410.01610, Figure 2), and measure how
far they travelled."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from upit.core.progress import Autocast
from upit.evaluation.scores import domain_losses, evaluate
from upit.expansion.merging import task_vector
from upit.preparation.expert import Expert
from upit.preparation.placement import borrowed, load_experts

Track = Callable[[Iterable], Iterable]
HIGHER_IS_BETTER = {"loss": False, "exact_match": True}


def score_checkpoints(
    dense: PreTrainedModel,
    pool: Sequence[Expert],
    data,
    *,
    exact_match: bool = True,
    autocast: Autocast = nullcontext,
    track: Track = lambda experts: experts,
) -> list[dict[str, Any]]:
    """Held-out scores per domain of every checkpoint's FFN in the dense model's other weights, as a MoE would use it.

    Args:
        dense: borrowed, see :func:`upit.preparation.placement.borrowed`.
        data: see :func:`upit.evaluation.scores.evaluate`.
        exact_match: generate the answers too; takes much longer than the loss.
    Returns: one ``{"step", "epoch", "domains": {name: {"loss"[, "exact_match"]}}}`` a checkpoint.
    """
    scored = []
    with borrowed(dense):
        loading = load_experts(dense, pool)
        for expert in track(pool):
            next(loading)
            if exact_match:
                domains = evaluate(dense, data, autocast=autocast)["domains"]
            else:
                domains = {
                    name: {"loss": loss} for name, loss in domain_losses(dense, data, autocast=autocast).items()
                }
            scored.append({"step": expert.step, "epoch": expert.epoch, "domains": domains})
    return scored


def specialist_gain(checkpoints: Sequence[Mapping[str, Any]], metric: str) -> float:
    """What an oracle that picks the best checkpoint for each domain gains over the best single checkpoint.

    Means over the domains, in the metric's unit (nats, or 0..1); never negative, and 0 where one checkpoint is the
    best of all domains.
    """
    sign = 1.0 if HIGHER_IS_BETTER[metric] else -1.0
    domains = checkpoints[0]["domains"]
    scores_MC = torch.tensor(
        [[sign * point["domains"][name][metric] for name in domains] for point in checkpoints], dtype=torch.float64
    )
    return float(scores_MC.amax(0).mean() - scores_MC.mean(1).max())


def distances(pool: Sequence[Expert], base: Expert, *, track: Track = lambda names: names) -> list[dict[str, Any]]:
    """How far the checkpoints' FFN weights travelled, as parts of the base's norm; streams tensor by tensor.

    Returns: one ``{"step", "epoch", "from_base", "from_previous"}`` a checkpoint.
    """
    squares = torch.zeros(2, len(pool), dtype=torch.float64)
    size = 0.0
    for name in track(base.shapes):
        origin = base.read(name)
        size += float(origin.double().square().sum())
        previous = origin
        for i, expert in enumerate(pool):
            tensor = expert.read(name)
            squares[0, i] += task_vector(tensor, origin).double().square().sum()
            squares[1, i] += task_vector(tensor, previous).double().square().sum()
            previous = tensor
    from_base, from_previous = (squares.sqrt() / max(size, 1e-30) ** 0.5).tolist()
    return [
        {"step": expert.step, "epoch": expert.epoch, "from_base": far, "from_previous": stride}
        for expert, far, stride in zip(pool, from_base, from_previous, strict=True)
    ]
