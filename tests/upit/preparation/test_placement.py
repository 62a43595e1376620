"""The dense model is lent for experts to stand in, and comes back as it was."""

import pytest
import torch

from tests.upit.conftest import make_data
from upit.model.families import is_expert
from upit.preparation.placement import borrowed, load_experts
from upit.router_init import HiddenMean, Ridge, RoutingVectors
from upit.router_init.scoring import SeedScorer
from upit.router_init.seeds import LowestPerplexity

DATA = make_data(12)


@pytest.fixture
def pool(dense, make_pool):
    return make_pool(dense, 2)


def content(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def spoil(model) -> None:
    """What a careless borrower could leave behind."""
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    torch.rand(3)
    model.train()
    for param in model.parameters():
        param.requires_grad_(False)
        param.data.add_(1.0)


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_all_comes_back(dense, ends):
    dense.train()
    dense.model.layers[0].eval()
    dense.model.norm.weight.requires_grad_(False)
    before, modes = content(dense), [module.training for module in dense.modules()]
    random = torch.get_rng_state()
    try:
        with borrowed(dense, keep=lambda name: True):
            assert not any(module.training for module in dense.modules())
            spoil(dense)
            if ends == "badly":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert same(content(dense), before)
    assert [module.training for module in dense.modules()] == modes
    assert [name for name, p in dense.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(param.grad is None for param in dense.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_only_what_is_kept_comes_back_and_nothing_after_a_forfeit(dense):
    before = content(dense)
    with borrowed(dense):
        spoil(dense)
    changed = {name for name, tensor in content(dense).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not is_expert(name)}
    with borrowed(dense, keep=lambda name: True) as loan:
        spoil_experts(dense)
        loan.forfeit()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in content(dense).items())


def test_a_state_dict_holds_the_dense_model_at_any_moment(dense, pool):
    before = content(dense)
    with borrowed(dense) as outer:
        for expert in load_experts(dense, pool.experts):
            assert same(content(dense), before)
            name = next(iter(expert.shapes))
            assert torch.equal(dense.get_parameter(name), expert.read(name)), "the expert stands there meanwhile"
            with borrowed(dense) as inner:
                assert inner is outer
            assert torch.equal(dense.get_parameter(name), expert.read(name)), "the outer loan alone restores"
    assert same(content(dense), before)


def test_tied_weights_come_back_under_both_names(dense):
    before = content(dense)
    with borrowed(dense, keep=lambda name: True):
        dense.lm_head.weight.data.add_(1.0)
        assert same(content(dense), before)
    assert same(content(dense), before)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight


def test_an_interrupted_restoration_still_shows_the_dense_model(dense, monkeypatch):
    before = content(dense)
    loan = borrowed(dense)
    loan.__enter__()
    spoil_experts(dense)
    monkeypatch.setattr("upit.preparation.placement.local", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loan.__exit__(None, None, None)
    assert same(content(dense), before)


def spoil_experts(model) -> None:
    for name, param in model.named_parameters():
        if is_expert(name):
            param.data.add_(1.0)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


ROUTERS = [RoutingVectors(epochs=1), RoutingVectors(epochs=1, expert_lr=1e-2), HiddenMean(), Ridge()]


@pytest.mark.parametrize("router", ROUTERS, ids=["vectors", "experts too", "mean", "ridge"])
@pytest.mark.parametrize("fails", [False, True])
def test_scoring_and_every_router_bring_it_back(dense, pool, tmp_path, monkeypatch, router, fails):
    before = content(dense)
    dense.train()
    scorer = SeedScorer(dense, list(range(8)), DATA, file=tmp_path / "seeds.json")
    seeds = scorer.assign(pool.experts, LowestPerplexity())
    assert same(content(dense), before)
    assert dense.training
    if fails:
        original, calls = torch.optim.AdamW.step, []

        def step(self, *args):
            calls.append(original(self, *args))
            if len(calls) > 1:
                raise RuntimeError("out of memory")

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        monkeypatch.setattr("upit.router_init.hidden_states.ffn_inputs_by_example", interrupt)
    with pytest.raises((RuntimeError, KeyboardInterrupt)) if fails else monkeypatch.context():
        router(dense, pool.experts, seeds, DATA, directory=tmp_path / "router")
    assert same(content(dense), before)
    assert all(param.grad is None for param in dense.parameters())
    assert dense.training
