"""Router initialisation on files: seed data, scores, buckets and the router, without a trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from upit.core.batches import TrainingData
from upit.core.files import Estimate
from upit.core.tensor_files import TensorFiles
from upit.model.families import is_expert
from upit.preparation.checks import checked_initialisation
from upit.preparation.expert import Expert
from upit.preparation.placement import borrowed
from upit.router_init.base import RouterInit, WithoutData
from upit.router_init.scoring import SeedScorer
from upit.router_init.seeds import Assignment, LowestPerplexity, draw_seed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def initialise(
    router: RouterInit,
    load: Callable[[], PreTrainedModel],
    experts: list[Expert],
    config: PretrainedConfig,
    data: TrainingData | None,
    *,
    seed_fraction: float,
    assignment: Assignment | None,
    seed: int,
    directory: Path,
    track: Callable[[Iterable, str], Iterable],
) -> tuple[list[Expert], Tensor]:
    """Initialise a router outside of any fit.

    Args:
        load: gives the dense model, which is needed only where there is something to learn.
        experts: see :func:`upit.preparation.sources.experts_at`.
        config: the dense model's.
        data: what to learn from; its seed examples are drawn, scored and assigned first.
        seed_fraction, assignment, seed: as for ``callbacks.Upcycling``.
        directory: what an interrupted initialisation can use again.
        track: wraps items under a title, for a progress bar.
    Returns: the experts, which may have been trained along, and ``router_DEH``.
    Raises: ValueError: there is something to learn but no data, or its tokenizer is not the model's.
    """
    router.check_description("router")
    router.check(config, len(experts))
    if isinstance(router, WithoutData):
        result = experts, router.weights(config, len(experts), seed=seed)
        return checked_initialisation(router, result, config, len(experts))
    if data is None:
        raise ValueError(f"router={router} learns from seed data: set data to a data module")
    from upit.model.loading.build import check_tokenizer
    from upit.upcycling.rehearsal import rehearse_assignment

    assignment = assignment or LowestPerplexity()
    assignment.check_description("assignment")
    rehearse_assignment(assignment, len(experts))
    data.prepare_data()
    data.setup("fit")
    check_tokenizer(config, data.tokenizer, source="base")
    indices = draw_seed(len(data.train_set), fraction=seed_fraction, seed=seed, minimum=len(experts))
    dense = load().eval()
    with borrowed(dense, keep=lambda name: False):  # nobody needs it afterwards
        scorer = SeedScorer(dense, indices, data, file=directory / "seed_perplexity.json")
        seeds = scorer.assign(experts, assignment, seed=seed, track=lambda items: track(items, "Scoring seed data"))
        print(f"Seed examples of each expert: {seeds.counts}")
        result = router(
            dense,
            experts,
            seeds,
            data,
            directory=directory,
            seed=seed,
            track=lambda items: track(items, "Initialising the router"),
        )
    return checked_initialisation(router, result, config, len(experts))


def learning_estimate(router: RouterInit, base: TensorFiles, num_experts: int) -> Estimate:
    """What learning a router takes: the dense model in float32, and of experts that are trained along their gradients,
    AdamW's two moments and their files. Without what a batch takes, and the hidden states kept for routing vectors.
    """
    if isinstance(router, WithoutData):
        return Estimate(0, 0)
    model = sum(4 * math.prod(entry.shape) for entry in base.values())
    expert = sum(4 * math.prod(entry.shape) for name, entry in base.items() if is_expert(name))
    return Estimate(model + 3 * expert, num_experts * expert) if router.trains_experts else Estimate(model, 0)


def dense_model(base: str, moe: str | None = None) -> PreTrainedModel:
    """The dense model at a directory, all but its FFN taken from a MoE's directory where one is given."""
    from upit.model.loading.build import load_pretrained
    from upit.upcycling.non_experts import NamedNonExperts

    dense = load_pretrained(base)
    if moe:
        NamedNonExperts(moe).fill(dense, [])
    return dense


def work_beside(output: Path) -> Path:
    """Where the work for an output is kept."""
    return output.with_name(output.name + ".router")
