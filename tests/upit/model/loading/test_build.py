"""Configs of models from scratch, and what is refused in them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY
from upit.model.loading.build import build, from_scratch, load_pretrained, outline, read_config, scratch_config


def test_an_outline_has_names_and_shapes_and_no_weights(data):
    model = outline(scratch_config(TINY, data.tokenizer))
    assert {param.device.type for param in model.parameters()} == {"meta"}
    assert tuple(model.model.embed_tokens.weight.shape) == (len(data.tokenizer), TINY["hidden_size"])


GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_seed_gives_one_model_wherever_it_is_built(data, device, dtype):
    config = scratch_config(TINY, data.tokenizer)
    torch.manual_seed(5)
    expected = build(config).state_dict()
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = from_scratch(config, seed=5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.device.type == device
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), expected[name].to(dtype)), name
    assert torch.equal(torch.rand(3), drawn), "the run's own generator moved"
    assert not torch.equal(from_scratch(config, seed=6).lm_head.weight, expected["lm_head.weight"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_sice": 32}, r"no field \['hidden_sice'\]; LlamaConfig takes \[.*'hidden_size'"),
        ({"vocab_size": 32}, r"no field \['vocab_size'\]"),
        ({"hidden_size": 33}, r"DenseModule\.config: .*hidden size \(33\)"),
        ({"hidden_size": "wide"}, r"DenseModule\.config: .*'wide'"),
        ({"hidden_act": "swoosh"}, r"DenseModule\.config\.hidden_act='swoosh' must be one of \[.*'silu'"),
    ],
    ids=str,
)
def test_fields_that_cannot_work_are_named(data, wrong, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        scratch_config({**TINY, **wrong}, data.tokenizer)


def test_a_source_that_is_missing_is_named_with_its_field():
    with pytest.raises(FileNotFoundError, match=r"model='/nowhere/at/all' can't be loaded: .* no directory here"):
        read_config("/nowhere/at/all")


def test_a_checkpoint_that_lacks_a_weight_is_refused_not_filled_at_random(dense, tmp_path):
    dense.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"is not complete: tensors \['model.norm.weight'\] are missing"):
        load_pretrained(str(tmp_path))
