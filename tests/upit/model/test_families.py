"""Every family: parity with the dense model, stock transformers' loading, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

from tests.upit.tiny import dense_config, dense_model, expert_of
from upit.core.batches import collate
from upit.model.experts import dispatch as experts
from upit.model.families import FAMILIES, FFN, check_top_k, expert_name, family_of, is_expert, moe_config
from upit.model.families.qwen import gate_row
from upit.model.forward import response_logits
from upit.model.loading.build import build
from upit.model.loading.identity import config_of, identity_of
from upit.model.routers import last_routing, moe_routers
from upit.upcycling.assemble import upcycle

IDS_BT = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
every_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def upcycled(family, tmp_path, *, seeds=(0, 0, 0, 0)):
    """A dense model and a MoE from it with one expert per seed, the router random."""
    dense = dense_model(family)
    files = [expert_of(dense_model(family, seed), tmp_path / f"{i}.safetensors") for i, seed in enumerate(seeds)]
    router_DEH = torch.randn(2, len(seeds), 32, generator=torch.Generator().manual_seed(2))
    moe = build(moe_config(dense.config, num_experts=len(seeds), top_k=2)).eval()
    with torch.no_grad():
        for param in moe.parameters():
            param.fill_(float("nan"))  # what upcycling forgets shows
    upcycle(moe, dense, files, router_DEH)
    return dense, moe, router_DEH


@every_family
@torch.no_grad()
def test_identical_experts_reproduce_the_dense_logits(family, tmp_path):
    dense, moe, _ = upcycled(family, tmp_path)
    assert moe.config.model_type == FAMILIES[family].moe_type
    assert dense(IDS_BT).logits.std() > 0.1
    torch.testing.assert_close(moe(IDS_BT).logits, dense(IDS_BT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@every_family
def test_the_shapes_of_a_complete_checkpoint_are_those_that_transformers_saves(family, tied, tmp_path):
    model = dense_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert FAMILIES[family].dense_shapes(model.config) == saved
    assert FAMILIES[family].dense_shapes(moe_config(model.config, num_experts=3, top_k=2)) == saved


@torch.no_grad()
def test_the_shared_expert_of_qwen2_adds_nothing_and_its_gate_is_never_zero(tmp_path):
    _, moe, _ = upcycled("qwen2", tmp_path, seeds=(0, 1, 2))
    logits = []
    for layer in moe.model.layers:
        layer.mlp.shared_expert_gate.register_forward_hook(lambda _, __, z: logits.append(z))
    with_row = moe(IDS_BT).logits
    z = torch.stack(logits)
    assert (F.silu(z) / z).isfinite().all()  # how llama.cpp computes the sigmoid
    for layer in moe.model.layers:
        layer.mlp.shared_expert_gate.weight.zero_()
    assert torch.equal(moe(IDS_BT).logits, with_row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_row_has_no_zero_in_any_dtype(dtype):
    row_1H = gate_row(8).to(dtype)
    assert row_1H.shape == (1, 8)
    assert (row_1H != 0).all()
    cancelling = torch.tensor([1.0, -1.0, 0, 0, 0, 0, 1.0, -1.0], dtype=dtype)  # equal entries would give zero
    assert cancelling @ row_1H[0] != 0


@every_family
@torch.no_grad()
def test_stock_transformers_loads_what_is_saved(family, tmp_path):
    _, moe, router_DEH = upcycled(family, tmp_path, seeds=(0, 1, 2))
    moe.save_pretrained(tmp_path / "moe")
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    torch.testing.assert_close(stock.eval()(IDS_BT).logits, moe(IDS_BT).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.stack([router.weight for router in moe_routers(stock)]), router_DEH)


@every_family
def test_the_grouped_experts_forward_serves_it(family, tmp_path):
    dense, moe, _ = upcycled(family, tmp_path, seeds=(0, 1, 2))
    assert moe.config._experts_implementation == experts.NAME
    with torch.no_grad():
        ours = moe(IDS_BT).logits
        moe.config._experts_implementation = "eager"
        torch.testing.assert_close(ours, moe(IDS_BT).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, dense(IDS_BT).logits, atol=0.05), "different experts changed nothing"
    experts.use(moe)
    moe(IDS_BT).logits.sum().backward()
    assert last_routing(moe)[0].shape == (2, 40, 3)
    assert all(router.weight.grad.abs().sum() > 0 for router in moe_routers(moe))


@every_family
def test_the_identity_in_checkpoints_rebuilds_it(family):
    config = moe_config(dense_config(family), num_experts=3, top_k=2)
    identity = identity_of(build(config), phase="moe", swap_step=1)
    assert (identity["num_experts"], identity["top_k"]) == (3, 2)
    again = config_of(identity)
    assert [(n, p.shape) for n, p in build(again).named_parameters()] == [
        (n, p.shape) for n, p in build(config).named_parameters()
    ]


@torch.no_grad()
def test_training_sees_the_sliding_window_that_stock_attention_has():
    model = dense_model("mistral")
    row = {"input_ids": IDS_BT[0].tolist(), "labels": [-100, *IDS_BT[0, 1:].tolist()]}
    ours = response_logits(model, collate([[0]], [row], pad_id=0))[0]
    torch.testing.assert_close(ours, model(IDS_BT[:1]).logits[0, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True: Mixtral has no biases"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True: Mixtral has no biases"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True: Qwen2-MoE"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True: Qwen3-MoE"),
    ],
)
def test_refuses_what_the_moe_cannot_express(family, fields, message):
    with pytest.raises(ValueError, match=message):
        moe_config(dense_config(family, **fields), num_experts=2, top_k=1)


def test_refuses_other_architectures():
    with pytest.raises(ValueError, match=r"model_type='gpt2'.*'llama', 'mistral', 'olmo2', 'qwen2', 'qwen3'"):
        family_of(GPT2Config())


def test_experts_are_exactly_the_ffn_weights():
    names = {name for name, _ in dense_model("llama").named_parameters() if is_expert(name)}
    assert names == {expert_name(layer, projection) for layer in range(2) for projection in FFN}


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 0), (4, 5), (1, 2), (0, 1)])
def test_top_k_must_lie_between_one_and_the_experts(num_experts, top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} must lie between 1 and num_experts={num_experts}"):
        check_top_k(num_experts, top_k)
