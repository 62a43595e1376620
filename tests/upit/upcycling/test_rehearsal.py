"""Dry calls before any work: what is wrong with a choice is named, and nothing of the process changes."""

import pytest
import torch

from tests.upit.pools import random_ffn
from tests.upit.preparation.test_checks import own
from tests.upit.tiny import dense_config
from upit.expansion.merging import Dare, DareTies, Linear, Merge, Slerp, Ties
from upit.expansion.selection import (
    BestParents,
    Even,
    LastCheckpoints,
    MostDissimilar,
    MostDiverse,
    MostSimilar,
    Parents,
    RandomParents,
    Selection,
)
from upit.expansion.similarity import Cosine, Euclidean, Functional
from upit.model.families import moe_config
from upit.router_init import RandomRouter, RoutingVectors
from upit.router_init.base import WithoutData
from upit.router_init.seeds import Assignment, LowestPerplexity, RandomAssignment, RelativeLoss
from upit.upcycling.growth import MergedRows, NewRows, RandomRows
from upit.upcycling.rehearsal import rehearse_assignment, rehearse_expansion, rehearse_router, rehearse_rows

SHAPES = {name: tuple(tensor.shape) for name, tensor in random_ffn(0).items()}


def rehearse(available=3, num_experts=5, dtype=torch.float32, metrics=(), **choices):
    settings = {"merge": Linear(), "parents": MostDissimilar(), "similarity": Cosine(), "selection": Even()}
    numbers = {"available": available, "num_experts": num_experts, "metrics": metrics}
    rehearse_expansion(**{**settings, **choices}, **numbers, shapes=SHAPES, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge", [Linear(), Slerp(), Ties(), Dare(), DareTies()], ids=repr)
def test_our_merges_pass(merge, dtype):
    rehearse(merge=merge, dtype=dtype)


def test_our_other_choices_pass():
    for parents in (MostSimilar(), RandomParents(), BestParents("loss")):
        rehearse(parents=parents, metrics=[{"loss"}, {}, {"loss"}])
    for similarity in (Euclidean(), Functional(), Cosine("zero")):
        rehearse(similarity=similarity)
    for selection in (LastCheckpoints(), MostDiverse()):
        rehearse(available=7, num_experts=3, selection=selection)
    for assignment in (LowestPerplexity(), LowestPerplexity(None), RelativeLoss(), RandomAssignment()):
        rehearse_assignment(assignment, 5)
    config = dense_config("llama")
    for router in (RandomRouter(), RoutingVectors()):
        rehearse_router(router, config, 4)
    for rows in (MergedRows(), RandomRows()):
        rehearse_rows(rows, moe_config(config, num_experts=4, top_k=2), 4, 7)


def in_place(self, tensors, weights, base, generators):
    return base.add_(tensors[0])


def by_chance(self, tensors, weights, base, generators):
    return tensors[0] + torch.randn_like(tensors[0])


def as_float32(self, tensors, weights, base, generators):
    return tensors[0].float() + tensors[1].float()


def infinite(self, tensors, weights, base, generators):
    return tensors[0] / torch.zeros_like(base)


def crash(self, *_, **__):
    raise KeyError("no such layer")


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (in_place, "changed a tensor that it was given: work on a copy"),
        (by_chance, "made two children of the same parents and seed"),
        (as_float32, "torch.float32 on cpu, expected torch.bfloat16"),
        (infinite, "made NaN or infinity"),
    ],
)
def test_a_merge_that_would_fail_or_change_its_parents_is_named(merge, message):
    with pytest.raises(ValueError, match=rf"test_checks\.Own .*{message}"):
        rehearse(merge=own(Merge, __call__=merge), dtype=torch.bfloat16)


def test_a_crash_says_that_it_comes_from_a_dry_call():
    with pytest.raises(KeyError) as caught:
        rehearse(merge=own(Merge, __call__=crash))
    assert caught.value.__notes__ == [
        "in a dry call of tests.upit.preparation.test_checks.Own with small random values, before any work"
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rehearse(parents=own(Parents, cost=crash, choose=lambda *_, **__: (2, 2))), r"parents \(2, 2\)"),
        (lambda: rehearse(3, 2, selection=own(Selection, choose=lambda *_: [1])), r"selected \[1\]"),
        (lambda: rehearse(similarity=own(Cosine, matrix=lambda self, p: p * torch.nan)), "similarities with NaN"),
        (
            lambda: rehearse_assignment(own(Assignment, __call__=lambda self, p, g: p.argmin(1) + 1), 3),
            r"assigned examples to experts \[3\]",
        ),
        (
            lambda: rehearse_router(
                own(WithoutData, weights=lambda *_, **__: torch.ones(2, 1, 32)), dense_config("llama"), 4
            ),
            r"shape \(2, 1, 32\), expected \(2, 4, 32\)",
        ),
        (
            lambda: rehearse_rows(
                own(NewRows, __call__=lambda self, rows, *_, **__: rows),
                moe_config(dense_config("llama"), num_experts=4, top_k=2),
                4,
                6,
            ),
            r"shape \(2, 4, 32\), expected \(2, 2, 32\)",
        ),
    ],
    ids=["parents", "selection", "similarity", "assignment", "router", "rows"],
)
def test_other_choices_are_named(call, message):
    with pytest.raises(ValueError, match=f"Own .*{message}"):
        call()


def test_the_generators_of_the_process_stay_as_they_were():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    rehearse(merge=own(Merge, __call__=lambda self, tensors, *_: torch.rand(1) * 0 + tensors[0]))
    rehearse_assignment(RandomAssignment(), 4)
    assert torch.equal(torch.random.get_rng_state(), before)
