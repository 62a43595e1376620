"""Routers from hidden states, against naive numpy over one example at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.upit.tiny import dense_model, expert_of
from upit.core.batches import IGNORE, collate
from upit.model.forward import ffn_inputs_of, response_states
from upit.preparation.placement import load_experts
from upit.router_init import HiddenMean, RandomRouter, Ridge
from upit.router_init.hidden_states import load_mean
from upit.router_init.scoring import Seeds

OWNERS = [0, 1, 2, 1, 0, 2, 2]


@pytest.fixture
def case(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 9, 7, 12, 6, 8, 10):
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE] * 3 + ids[3:]})
    data = SimpleNamespace(train_set=rows, tokenizer=SimpleNamespace(pad_token_id=0))
    experts = [expert_of(dense_model("llama", seed), tmp_path / f"{seed}.safetensors") for seed in range(3)]
    seeds = Seeds(list(range(7)), torch.ones(7, 3), torch.tensor(OWNERS))
    return dense_model("llama", 5), experts, seeds, data


@torch.no_grad()
def states_of(dense, experts, data):
    """FFN inputs, one (tokens, hidden) array a layer and example, under the mean of the experts."""
    load_mean(dense, experts)
    for row in range(len(data.train_set)):
        with ffn_inputs_of(dense) as inputs:
            response_states(dense, collate([[row]], data.train_set, pad_id=0))
        yield [h[0].numpy() for h in inputs]


def test_load_mean(case):
    dense, experts, _, _ = case
    load_mean(dense, experts)
    name = "model.layers.1.mlp.up_proj.weight"
    found = dict(dense.named_parameters())[name].detach()
    torch.testing.assert_close(found, sum(expert.read(name) for expert in experts) / 3)


def test_hidden_mean_is_the_direction_of_the_buckets_mean(case, tmp_path):
    dense, experts, seeds, data = case
    same, router_DEH = HiddenMean()(dense, experts, seeds, data, directory=tmp_path)
    states = list(states_of(dense, experts, data))
    for layer in range(2):
        for expert in range(3):
            mean = np.concatenate([s[layer] for s, owner in zip(states, OWNERS, strict=True) if owner == expert]).mean(
                0
            )
            expected = mean / np.linalg.norm(mean)
            np.testing.assert_allclose(router_DEH[layer, expert].numpy(), expected, atol=1e-5)
    assert same == experts


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
@torch.no_grad()
def test_mergekits_modes_take_what_transformers_calls_hidden_states(case, tmp_path, mode):
    dense, experts, seeds, data = case
    _, router_DEH = HiddenMean(mode)(dense, experts, seeds, data, directory=tmp_path)
    load_mean(dense, experts)
    prompts = []
    for row in data.train_set:
        output = dense(torch.tensor([row["input_ids"]]), output_hidden_states=True)
        states_DTH = torch.stack(output.hidden_states[:-1])[:, 0]
        prompts.append(states_DTH[:, -1] if mode == "hidden" else states_DTH.mean(1))
    for expert in range(3):
        mean_DH = sum(p for p, owner in zip(prompts, OWNERS, strict=True) if owner == expert) / OWNERS.count(expert)
        torch.testing.assert_close(router_DEH[:, expert], mean_DH / mean_DH.norm(dim=-1, keepdim=True))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"HiddenMean.mode='last' must be one of \['ffn', 'hidden', 'hidden_avg'\]"):
        HiddenMean("last")


def test_ridge_is_a_naive_solve(case, tmp_path):
    dense, experts, seeds, data = case
    _, router_DEH = Ridge(0.01)(dense, experts, seeds, data, directory=tmp_path)
    states = list(states_of(dense, experts, data))
    for layer in range(2):
        x = np.concatenate([s[layer] for s in states]).astype(np.float64)
        y = np.concatenate([np.eye(3)[[owner] * len(s[layer])] for s, owner in zip(states, OWNERS, strict=True)])
        penalty = 0.01 * np.trace(x.T @ x) / x.shape[1]
        expected = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
        np.testing.assert_allclose(router_DEH[layer].numpy(), expected.T, atol=1e-5)


def test_an_empty_bucket_gives_zeros(case, tmp_path):
    dense, experts, seeds, data = case
    seeds.expert_S = torch.zeros(7, dtype=torch.long)
    for router in (HiddenMean(), Ridge()):
        _, router_DEH = router(dense, experts, seeds, data, directory=tmp_path)
        assert router_DEH[:, 0].abs().sum() > 0
        assert router_DEH[:, 1:].abs().sum() == 0


def test_random_needs_no_seed_data(case, tmp_path):
    dense, experts, _, _ = case
    _, router_DEH = RandomRouter()(dense, experts, None, None, directory=tmp_path, seed=3)
    _, again = RandomRouter()(dense, experts, None, None, directory=tmp_path, seed=3)
    assert torch.equal(router_DEH, again)
    assert float(router_DEH.std()) == pytest.approx(dense.config.initializer_range, rel=0.2)
    next(load_experts(dense, experts))


def test_ridge_refuses():
    with pytest.raises(ValueError, match=r"Ridge.strength=0 must be positive"):
        Ridge(0)
