"""Each merge against a reference that is not ours, on the same tensors and the same masks."""

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from upit.expansion.merging import Dare, DareTies, Linear, Slerp, Ties, drop_mask, slerp, trim

WEIGHTS = [0.3, 0.7]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    base, *deltas = (torch.randn(31, 17, generator=generator) for _ in range(3))
    return base, [base + 0.1 * delta for delta in deltas]


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def deltas_of(base, parents):
    return [parent - base for parent in parents]


def with_masks(monkeypatch, shape, drop_rate):
    """Let peft drop what ours drops: the masks that the generators give."""
    masks = [drop_mask(shape, drop_rate, generator) for generator in generators()]
    drawn = iter(masks)
    monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda *_, **__: next(drawn).float())


def test_linear_is_task_arithmetic(tensors):
    base, parents = tensors
    expected = base + merge_utils.task_arithmetic(deltas_of(base, parents), torch.tensor(WEIGHTS))
    torch.testing.assert_close(Linear()(parents, WEIGHTS, base, generators()), expected)


@pytest.mark.parametrize("drop_rate", [0.0, 0.2, 0.9])
def test_dare_is_pefts(tensors, monkeypatch, drop_rate):
    base, parents = tensors
    ours = Dare(drop_rate)(parents, WEIGHTS, base, generators())
    with_masks(monkeypatch, base.shape, drop_rate)
    theirs = merge_utils.dare_linear(deltas_of(base, parents), torch.tensor(WEIGHTS), 1 - drop_rate)
    torch.testing.assert_close(ours, base + theirs)


def consensus(deltas, weights):
    """Sign election and normalised sum by mergekit's documentation, one parameter at a time (numpy, float64)."""
    merged = np.zeros(deltas[0].shape)
    for place in np.ndindex(merged.shape):
        votes = [(weight, float(delta[place])) for weight, delta in zip(weights, deltas, strict=True)]
        sign = 1 if sum(weight * value for weight, value in votes) >= 0 else -1
        kept = [(weight, value) for weight, value in votes if sign * value > 0]
        if kept:
            merged[place] = sum(weight * value for weight, value in kept) / sum(weight for weight, _ in kept)
    return torch.from_numpy(merged).float()


@pytest.mark.parametrize("drop_rate", [0.2, 0.6])
def test_dare_ties_is_a_drop_and_mergekits_consensus(tensors, drop_rate):
    base, parents = tensors
    masks = [drop_mask(base.shape, drop_rate, generator) for generator in generators()]
    deltas = [d * m / (1 - drop_rate) for d, m in zip(deltas_of(base, parents), masks, strict=True)]
    torch.testing.assert_close(
        DareTies(drop_rate)(parents, WEIGHTS, base, generators()), base + consensus(deltas, WEIGHTS)
    )


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_is_a_trim_and_mergekits_consensus(tensors, density):
    base, parents = tensors
    deltas = deltas_of(base, parents)
    for delta in deltas:
        smallest = np.argsort(delta.abs().flatten().numpy())[: delta.numel() - int(density * delta.numel())]
        delta.view(-1)[torch.from_numpy(smallest)] = 0
    torch.testing.assert_close(Ties(density)(parents, WEIGHTS, base, generators()), base + consensus(deltas, WEIGHTS))


@pytest.mark.parametrize("weights", [[0.05, 0.95], [0.5, 0.5], [0.95, 0.05]])
def test_what_one_parent_alone_keeps_is_neither_shrunk_nor_doubled(weights):
    base = torch.zeros(6)
    first, second = torch.tensor([1.0, 0, 0, 4, 5, 6]), torch.tensor([0, 2.0, 0, 4, 5, -6])
    child = Ties(1.0)([first, second], weights, base, generators())
    torch.testing.assert_close(child[:5], torch.tensor([1.0, 2, 0, 4, 5]))
    assert abs(child[5]) == 6, "one sign wins"
    assert child[5] == (6 if weights[0] >= 0.5 else -6), "the one with more weight"


def test_a_trim_keeps_at_least_one():
    assert trim(torch.tensor([1.0, -3.0, 2.0]), 0.1).tolist() == [0, -3, 0]


def test_ties_of_parents_that_agree_is_their_weighted_sum(tensors):
    base, (first, _) = tensors
    parents = [first, base + 3 * (first - base)]
    torch.testing.assert_close(
        Ties(1.0)(parents, WEIGHTS, base, generators()), Linear()(parents, WEIGHTS, base, generators())
    )


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_slerp_turns_by_its_share_of_the_angle(t):
    """Unit vectors: stays on the circle through both, at angle t * theta from the first (in numpy, float64)."""
    rng = np.random.default_rng(0)
    a, b = (v / np.linalg.norm(v) for v in rng.normal(size=(2, 40)))
    theta = np.arccos(a @ b)
    across = (b - (a @ b) * a) / np.linalg.norm(b - (a @ b) * a)
    expected = np.cos(t * theta) * a + np.sin(t * theta) * across
    found = slerp(torch.tensor(a), torch.tensor(b), t)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_slerp_against_the_base_turns_task_vectors(tensors):
    base, parents = tensors
    found = Slerp()(parents, WEIGHTS, base, generators())
    torch.testing.assert_close(found, base + slerp(*deltas_of(base, parents), 0.7))
    torch.testing.assert_close(Slerp("zero")(parents, WEIGHTS, base, generators()), slerp(*parents, 0.7))


@pytest.mark.parametrize("pair", [(torch.ones(5), 2 * torch.ones(5)), (torch.zeros(5), torch.ones(5))])
def test_slerp_is_linear_where_there_is_no_angle(pair):
    torch.testing.assert_close(slerp(*pair, 0.5), (pair[0] + pair[1]) / 2)


@pytest.mark.parametrize("merge", [Linear(), Slerp(), Ties(), Dare(), DareTies()], ids=repr)
def test_keeps_the_parents_dtype(tensors, merge):
    base, parents = tensors
    merged = merge([parent.bfloat16() for parent in parents], WEIGHTS, base.bfloat16(), generators())
    assert merged.dtype == torch.bfloat16
    assert merged.shape == base.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dare(1.0), r"Dare.drop_rate=1.0 must lie in \[0, 1\)"),
        (lambda: DareTies(-0.1), r"DareTies.drop_rate=-0.1 must lie in \[0, 1\)"),
        (lambda: Ties(0.0), r"Ties.density=0.0 must lie in \(0, 1\]"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_describes_itself():
    assert Dare(0.3).describe() == {"name": "Dare", "drop_rate": 0.3}
    assert repr(Ties(0.5)) == "Ties(density=0.5)"


@pytest.mark.parametrize("drop_rate", [0.0, 0.2, 0.999])
def test_a_mask_keeps_its_share_and_follows_its_generator(drop_rate):
    shape = torch.Size((1001, 333))
    mask = drop_mask(shape, drop_rate, torch.Generator().manual_seed(1))
    assert mask.shape == shape
    assert mask.float().mean().item() == pytest.approx(1 - drop_rate, abs=4e-3)
    assert torch.equal(mask, drop_mask(shape, drop_rate, torch.Generator().manual_seed(1)))
    if drop_rate:
        assert not torch.equal(mask, drop_mask(shape, drop_rate, torch.Generator().manual_seed(2)))
        halves = mask[:500].float(), mask[500:1000].float()
        assert np.corrcoef(*(half.flatten().numpy() for half in halves))[0, 1] == pytest.approx(0, abs=0.02)
