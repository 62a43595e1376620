"""Similarities against plain numpy, whole or grown row by row."""

import numpy as np
import pytest
import torch

from tests.upit.pools import flat, make_pool
from upit.expansion.similarity import Cosine, Euclidean, Functional


@pytest.fixture
def pool(tmp_path):
    return make_pool(tmp_path, 4)


def matrix(similarity, pool, **kwargs):
    experts = pool.experts
    return similarity.matrix(similarity.products(experts, len(experts), pool.base, **kwargs))


@pytest.mark.parametrize("against", ["base", "zero"])
def test_cosine_is_numpys(pool, against):
    origin = flat(pool.base).double() if against == "base" else 0.0
    vectors = np.stack([(flat(expert).double() - origin).numpy() for expert in pool.experts])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(matrix(Cosine(against), pool), unit @ unit.T, atol=1e-5)


def test_euclidean_is_minus_the_distance(pool):
    vectors = np.stack([flat(expert).double().numpy() for expert in pool.experts])
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    np.testing.assert_allclose(matrix(Euclidean(), pool), -distance, atol=1e-4)


def test_functional_compares_losses(pool):
    losses = {expert.sha256: torch.tensor([1.0, 2.0, 3.0]) + i * torch.tensor([1.0, -1, 0]) for i, expert in
              enumerate(pool.experts)}  # fmt: skip
    found = matrix(Functional(), pool, score=lambda expert: losses[expert.sha256])
    steps = torch.arange(4.0)
    torch.testing.assert_close(found.float(), -(steps[:, None] - steps[None]).abs() * (2 / 3) ** 0.5)


def test_functional_needs_a_model(pool):
    with pytest.raises(ValueError, match="Functional compares losses on seed data"):
        matrix(Functional(), pool)


@pytest.mark.parametrize("similarity", [Cosine(), Cosine("zero"), Euclidean()], ids=repr)
def test_a_new_expert_adds_one_row(pool, similarity):
    experts, base = pool.experts, pool.base
    whole = similarity.products(experts, 4, base)
    torch.testing.assert_close(similarity.products(experts, 1, base), whole[-1:])


def test_the_base_is_similar_to_nothing_but_itself(pool):
    experts = [pool.base, *pool.experts]
    found = Cosine().matrix(Cosine().products(experts, len(experts), pool.base))
    assert found[0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_experts_may_differ_in_dtype(pool, tmp_path):
    half = {name: pool.experts[2].read(name).bfloat16() for name in pool.base.shapes}
    pool.add(half, step=3, epoch=0.75, metrics={})
    vectors = np.stack([(flat(expert).double() - flat(pool.base).double()).numpy() for expert in pool.experts])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(matrix(Cosine(), pool), unit @ unit.T, atol=1e-5)
