"""Upcycling on files: identical to an independent construction, stock-loadable, and clear about what does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.upit.tiny import dense_model, expert_of
from upit.core.files import Estimate, read_json, write_json
from upit.core.tensor_files import INDEX, TensorFileError, TensorFiles
from upit.model.families import FAMILIES, moe_config
from upit.model.loading.configs import make_portable
from upit.offline.conversion import Conversion
from upit.offline.inputs import check_experts
from upit.preparation.sources import experts_at

ROUTER_DEH = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(9))


def save(family, directory, seed=0, dtype=torch.float32, **fields):
    dense_model(family, seed, **fields).to(dtype).save_pretrained(directory, max_shard_size="40KB")
    return directory


@pytest.fixture
def sources(tmp_path):
    return [save("llama", tmp_path / str(seed), seed) for seed in range(3)]


def conversion_of(base, paths, **kwargs):
    return Conversion(base, [expert for path in paths for expert in experts_at(path)], **kwargs)


def independent(paths, router_DEH, dtype=torch.float32):
    """The MoE built from whole models, by transformers' own names."""
    dense = [AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in paths]
    moe = AutoModelForCausalLM.from_config(moe_config(dense[0].config, num_experts=len(paths), top_k=2), dtype=dtype)
    state = moe.state_dict()
    for name, tensor in dense[0].state_dict().items():
        if ".mlp." not in name:
            state[name] = tensor
    for i in range(2):
        ffn = [model.model.layers[i].mlp for model in dense]
        gate_up = [torch.cat([f.gate_proj.weight, f.up_proj.weight]) for f in ffn]
        state[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        state[f"model.layers.{i}.mlp.experts.down_proj"] = torch.stack([f.down_proj.weight for f in ffn])
        state[f"model.layers.{i}.mlp.gate.weight"] = router_DEH[i].to(dtype)
        for name in state:
            if f"layers.{i}.mlp.shared_expert" in name:
                state[name] = torch.zeros_like(state[name])
                if name.endswith("shared_expert_gate.weight"):  # the gate of nothing; never zero, for llama.cpp
                    state[name] = torch.tensor([[1.0, 2**-12, *[2**-24] * 30]])
    moe.load_state_dict(state)
    return moe


def files_of(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_identical_to_an_independent_construction(family, tmp_path):
    paths = [save(family, tmp_path / str(seed), seed) for seed in range(3)]
    conversion_of(paths[0], paths).write(ROUTER_DEH, tmp_path / "moe", max_shard_bytes=50_000)
    expected = independent(paths, ROUTER_DEH)
    expected.save_pretrained(tmp_path / "expected")
    make_portable(tmp_path / "expected")
    ours, theirs = files_of(tmp_path / "moe"), files_of(tmp_path / "expected")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("moe", "expected")]
    assert configs[0] == configs[1]
    assert configs[0]["rope_theta"] == configs[0]["rope_parameters"]["rope_theta"]
    assert configs[0]["num_experts"] == 3
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(ids).logits, expected.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_output_is_sharded_as_asked(sources, tmp_path):
    conversion_of(sources[0], sources).write(ROUTER_DEH, tmp_path / "moe", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "moe" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "moe" / file).values()) for file in files]
    assert max(sizes) <= 50_000
    assert sum(sizes) == index["metadata"]["total_size"]
    conversion_of(sources[0], sources).write(ROUTER_DEH, tmp_path / "whole")
    assert not (tmp_path / "whole" / INDEX).exists()
    assert files_of(tmp_path / "whole").keys() == index["weight_map"].keys()


def test_brings_tokenizer_generation_config_and_card(sources, data, tmp_path):
    data.tokenizer.save_pretrained(sources[0])
    conversion_of(sources[0], sources).write(ROUTER_DEH, tmp_path / "moe")
    assert AutoTokenizer.from_pretrained(tmp_path / "moe").get_vocab() == data.tokenizer.get_vocab()
    assert json.loads((tmp_path / "moe/generation_config.json").read_text())["eos_token_id"] == 2
    assert str(sources[2]) in (tmp_path / "moe/README.md").read_text()


def test_experts_from_a_pool(sources, tmp_path):
    pool = tmp_path / "pool"
    entries = []
    for seed in range(3):
        expert = expert_of(dense_model("llama", seed), pool / f"{seed}.safetensors")
        entries.append(
            {"file": expert.file.name, "sha256": expert.sha256, "dtype": "float32", "step": seed, "epoch": 0}
        )
    write_json(pool / "manifest.json", {"version": 1, "base": entries[0], "experts": entries})
    for name, paths in (("a", [pool]), ("b", sources)):
        conversion_of(sources[0], paths).write(ROUTER_DEH, tmp_path / name)
    ours, theirs = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_converts_the_dtype(sources, tmp_path):
    conversion_of(sources[0], sources, dtype=torch.bfloat16).write(ROUTER_DEH, tmp_path / "moe")
    expected = independent(sources, ROUTER_DEH).to(torch.bfloat16)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert stock.dtype == torch.bfloat16
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(stock.parameters(), expected.parameters(), strict=True)
    )


def test_an_output_is_replaced_only_when_asked_and_complete(sources, tmp_path):
    output = tmp_path / "moe"
    conversion = conversion_of(sources[0], sources)
    conversion.write(ROUTER_DEH, output)
    before = files_of(output)
    with pytest.raises(FileExistsError, match="is not empty"):
        conversion.write(ROUTER_DEH, output)

    def broken(names):
        yield from list(names)[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion.write(ROUTER_DEH + 1, output, overwrite=True, track=broken)
    assert all(torch.equal(tensor, before[name]) for name, tensor in files_of(output).items())
    conversion.write(ROUTER_DEH + 1, output, overwrite=True)
    assert not torch.equal(files_of(output)["model.layers.0.block_sparse_moe.gate.weight"], ROUTER_DEH[0])


def test_estimate_and_room(sources, tmp_path):
    conversion = conversion_of(sources[0], sources)
    estimate = conversion.estimate()
    conversion.write(ROUTER_DEH, tmp_path / "moe")
    assert estimate.disk == sum(tensor.nbytes for tensor in files_of(tmp_path / "moe").values())
    assert estimate.memory == 64 * 32 * 8
    estimate.check(tmp_path / "new" / "moe")
    with pytest.raises(ValueError, match=r"needs 1000000000.00 GB of memory"):
        Estimate(10**18, 0).check(tmp_path)
    with pytest.raises(ValueError, match=r"needs 1000000000.00 GB of disk at"):
        Estimate(0, 10**18).check(tmp_path)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen3", {}, "model_type='qwen3', the dense model has 'llama'"),
        ("llama", {"vocab_size": 65}, "vocab_size=65, the dense model has 64"),
        ("llama", {"intermediate_size": 40}, "intermediate_size=40, the dense model has 48"),
        ("llama", {"num_hidden_layers": 1}, "num_hidden_layers=1, the dense model has 2"),
        ("llama", {"num_hidden_layers": 3}, "num_hidden_layers=3, the dense model has 2"),
        # the same shapes with other heads
        (
            "llama",
            {"num_attention_heads": 2, "num_key_value_heads": 1},
            "num_attention_heads=2, the dense model has 4",
        ),
        ("llama", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05, the dense model has 1e-06"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu', the dense model has 'silu'"),
        ("llama", {"tie_word_embeddings": False}, "tie_word_embeddings=False, the dense model has True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            r"rope_parameters.rope_theta=10000.0, the dense model has 50000.0",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 5e4, **LLAMA3}},
            r"rope_parameters.rope_type='llama3', the dense model has 'default'",
        ),
    ],
)
def test_another_architecture_is_refused_by_field(sources, tmp_path, family, fields, message):
    odd = save(family, tmp_path / "odd", **fields)
    with pytest.raises(ValueError, match=rf"odd/config\.json: {message}"):
        conversion_of(sources[0], [*sources, odd])
    with pytest.raises(ValueError, match=rf"odd/config\.json: {message}"):
        check_experts([expert for path in (*sources, odd) for expert in experts_at(path)], experts_at(sources[0])[0])


def test_what_does_not_change_the_model_may_differ(sources):
    file = sources[1] / "config.json"
    fields = read_json(file) | {"use_cache": False, "transformers_version": "4.0.0", "max_position_embeddings": 512}
    write_json(file, fields | {"eos_token_id": 7, "initializer_range": 0.5, "torch_dtype": "float32"})
    conversion_of(sources[0], sources)


def test_another_dtype_is_refused(sources, tmp_path):
    odd = save("llama", tmp_path / "odd", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"odd/.*: tensor .*_proj.weight' has dtype torch.bfloat16"):
        conversion_of(sources[0], [*sources, odd])


def without(directory, name):
    """Take a tensor out of a checkpoint, and out of its index where it has one."""
    file = TensorFiles(directory)[name].file
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    index = directory / INDEX
    if index.exists():
        content = read_json(index)
        del content["weight_map"][name]
        write_json(index, content)


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "model.norm.weight"),
        ("mistral", "lm_head.weight"),
        ("qwen2", "model.layers.1.self_attn.q_proj.bias"),
        ("olmo2", "model.layers.0.post_feedforward_layernorm.weight"),
    ],
)
def test_an_incomplete_base_or_expert_is_refused(tmp_path, family, name, sharded):
    paths = [tmp_path / "0", tmp_path / "1"]
    for seed, path in enumerate(paths):
        dense_model(family, seed).save_pretrained(path, max_shard_size="40KB" if sharded else "5GB")
    conversion_of(paths[0], paths)
    without(paths[1], name)
    for base, experts in ((paths[1], paths[:1]), (paths[0], paths)):
        with pytest.raises(TensorFileError, match=rf"1: tensor '{name}' is missing"):
            conversion_of(base, experts, top_k=1)
    found = [expert for path in paths for expert in experts_at(path)]
    for base, experts in ((found[1], found[:1]), (found[0], found)):
        with pytest.raises(TensorFileError, match=rf"1: tensor '{name}' is missing"):
            check_experts(experts, base)


def test_a_tensor_of_no_model_is_left_out_as_transformers_does(sources, tmp_path):
    file = TensorFiles(sources[0])["model.norm.weight"].file
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # a buffer that old checkpoints hold
    save_file({**load_file(file), **old}, file)
    conversion_of(sources[0], sources).write(ROUTER_DEH, tmp_path / "moe")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not info["unexpected_keys"]


def test_tokenizer_files_of_every_kind_come_along(sources, tmp_path):
    kinds = ["tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.txt", "qwen.tiktoken",
             "tokenization_own.py", "chat_template.json", "additional_chat_templates/rag.jinja"]  # fmt: skip
    (sources[0] / "additional_chat_templates").mkdir()
    for name in kinds:
        (sources[0] / name).write_text(name)
    (sources[0] / "optimizer.pt").write_text("not the model's")
    conversion_of(sources[0], sources).write(ROUTER_DEH, tmp_path / "moe")
    assert [(tmp_path / "moe" / name).read_text() for name in kinds] == kinds
    assert not (tmp_path / "moe/optimizer.pt").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_another_vocabulary_is_refused_without_a_tokenizer_json(sources, name):
    for path, content in zip(sources, ['{"a": 0}', '{"a": 0}', '{"b": 0}'], strict=True):
        (path / name).write_text(content)
    conversion_of(sources[0], sources[:2])
    with pytest.raises(ValueError, match=rf"2/{name}: its vocabulary is not that of the base"):
        conversion_of(sources[0], sources)


def test_another_vocabulary_is_refused(sources, data, tmp_path):
    for path in sources:
        data.tokenizer.save_pretrained(path)
    content = json.loads((sources[1] / "tokenizer.json").read_text())
    (sources[1] / "tokenizer.json").write_text(json.dumps(content, indent=1))
    conversion_of(sources[0], sources)
    word = next(iter(content["model"]["vocab"]))
    content["model"]["vocab"][word + "x"] = content["model"]["vocab"].pop(word)
    (sources[1] / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1/tokenizer.json: its vocabulary is not that of the base"):
        conversion_of(sources[0], sources)


def test_a_broken_number_is_found_and_nothing_is_left(sources, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(sources[1], broken)
    name = "model.layers.1.mlp.up_proj.weight"
    file = TensorFiles(broken)[name].file
    tensors = load_file(file)
    tensors[name][3, 4] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"{file.name}: tensor '{name}' holds NaN or infinity"):
        conversion_of(sources[0], [sources[0], broken, sources[2]]).write(ROUTER_DEH, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_old_buffers_are_left_out(tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "old")
    tensors = load_file(tmp_path / "old/model.safetensors")
    save_file(
        {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "old/model.safetensors"
    )
    conversion_of(tmp_path / "old", [tmp_path / "old"] * 3).write(ROUTER_DEH, tmp_path / "moe")
    assert not [name for name in files_of(tmp_path / "moe") if "rotary" in name]
