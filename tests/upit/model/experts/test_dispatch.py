"""``upit_grouped`` against the stock eager loop: outputs and gradients, dtypes, idle experts, strided input."""

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from upit.model.experts.dispatch import NAME, QUACK, TRITON, grouped_forward, launched_by_graphs, takes_quack, use
from upit.model.families import moe_config
from upit.model.loading.build import build

TOKENS, HIDDEN, EXPERTS = 24, 32, 4


@pytest.fixture
def layer():
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=48, num_local_experts=EXPERTS)
    experts = MixtralExperts(config)
    for param in experts.parameters():
        torch.nn.init.normal_(param, std=0.2)
    return experts


def route(top_k: int, *, idle: int | None = None):
    torch.manual_seed(1)
    logits = torch.randn(TOKENS, EXPERTS)
    if idle is not None:
        logits[:, idle] = -99.0
    weights, ids = logits.softmax(-1).topk(top_k)
    return ids, weights / weights.sum(-1, keepdim=True)


def outputs_and_gradients(forward, layer, x_TH, ids_TK, weights_TK):
    x_TH, weights_TK = x_TH.detach().clone().requires_grad_(), weights_TK.clone().requires_grad_()
    out = forward(layer, x_TH, ids_TK, weights_TK)
    torch.manual_seed(2)
    leaves = [x_TH, weights_TK, layer.gate_up_proj, layer.down_proj]
    return [out, *torch.autograd.grad((out.float() * torch.randn(out.shape)).sum(), leaves)]


def stock(layer, x_TH, ids_TK, weights_TK):
    return type(layer).forward.__wrapped__(layer, x_TH, ids_TK, weights_TK)


@pytest.mark.parametrize(
    ("top_k", "idle"), [(1, None), (2, None), (EXPERTS, None), (1, 0), (2, 0), (2, 1), (2, EXPERTS - 1)]
)
def test_equals_the_eager_loop(layer, top_k, idle):
    ids, weights = route(top_k, idle=idle)
    x = torch.randn(TOKENS, HIDDEN)
    ours = outputs_and_gradients(grouped_forward, layer, x, ids, weights)
    theirs = outputs_and_gradients(stock, layer, x, ids, weights)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if idle is not None:
        assert not ours[3][idle].any(), "an expert without a token has a gradient of zeros"


def test_equals_the_eager_loop_under_autocast(layer):
    ids, weights = route(2)
    x = torch.randn(TOKENS, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        ours = outputs_and_gradients(grouped_forward, layer, x, ids, weights)
        theirs = outputs_and_gradients(stock, layer, x, ids, weights)
    assert ours[0].dtype == x.dtype
    assert ours[3].dtype == torch.float32, "gradients arrive in the weights' own dtype"
    exact = outputs_and_gradients(stock, layer, x, ids, weights)
    for found, expected, reference in zip(ours, theirs, exact, strict=True):
        scale = reference.abs().max()
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=0.02)
        assert not torch.equal(found, reference), "autocast must reach the grouped products"


def test_gives_back_the_dtype_of_the_hidden_states(layer):
    """The router's weights stay in float32 where the model is in bfloat16."""
    ids, weights = route(2)
    x = torch.randn(TOKENS, HIDDEN)
    exact = grouped_forward(layer, x, ids, weights)
    out = grouped_forward(layer.bfloat16(), x.bfloat16(), ids, weights)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


def test_takes_input_that_is_not_contiguous(layer):
    ids, weights = route(2)
    x = torch.randn(HIDDEN, TOKENS).T
    assert not x.is_contiguous()
    strided = grouped_forward(layer, x, ids.T.contiguous().T, weights.T.contiguous().T)
    torch.testing.assert_close(strided, grouped_forward(layer, x.contiguous(), ids, weights), rtol=0, atol=0)


def test_a_built_moe_runs_it_and_its_saved_config_says_nothing_of_it(dense):
    moe = build(moe_config(dense.config, num_experts=EXPERTS, top_k=2)).eval()
    ids = torch.randint(3, 64, (2, 9))
    grouped = moe(ids).logits
    assert "_experts_implementation" not in moe.config.to_json_string()
    assert moe.config._experts_implementation == "upit_grouped"
    moe.config._experts_implementation = "eager"
    torch.testing.assert_close(grouped, moe(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [TRITON, QUACK])
def test_where_gpu_kernels_do_not_run_every_name_is_the_plain_path(dense, name):
    moe = build(moe_config(dense.config, num_experts=EXPERTS, top_k=2)).eval()
    ids = torch.randint(3, 64, (2, 9))
    automatic = moe(ids).logits
    use(moe, name)
    assert torch.equal(automatic, moe(ids).logits)


@pytest.mark.parametrize(
    ("name", "hidden", "taken"),
    [
        (NAME, 64, False),
        (NAME, 2048, True),
        (NAME, 2052, False),
        (NAME, 4096, False),
        (QUACK, 64, True),
        (QUACK, 60, False),
        (TRITON, 2048, False),
    ],
)
def test_quack_is_taken_where_it_helps(monkeypatch, name, hidden, taken):
    monkeypatch.setattr("upit.model.experts.dispatch.has_quack", lambda: True)
    assert takes_quack(name, hidden, 96) == taken
    monkeypatch.setattr("upit.model.experts.dispatch.has_quack", lambda: False)
    assert not takes_quack(name, hidden, 96)


def test_graphs_launch_quack_at_small_widths_too(dense):
    moe = build(moe_config(dense.config, num_experts=EXPERTS, top_k=2))

    def capture():
        with launched_by_graphs(moe):
            assert moe.config._experts_implementation == QUACK
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        capture()
    assert moe.config._experts_implementation == NAME
    moe.config._experts_implementation = TRITON
    with launched_by_graphs(moe):
        assert moe.config._experts_implementation == TRITON
    moe.config._experts_implementation, moe.config.hidden_size = NAME, 4096
    with launched_by_graphs(moe):
        assert moe.config._experts_implementation == NAME
