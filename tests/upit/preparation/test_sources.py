"""Experts from every source: which ones, what is in them, and what is refused."""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.upit.pools import make_pool, near, random_ffn
from tests.upit.tiny import dense_model
from upit.core.tensor_files import TensorFileError
from upit.model.families import is_expert
from upit.preparation.pool import Pool
from upit.preparation.sources import Checkpoints, Copies, DropUpcycling, Harvested


@pytest.fixture
def dense():
    return dense_model("llama")


@pytest.fixture
def words():
    """Makes a tokenizer of whole words."""

    def make(vocabulary):
        model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0])
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))

    return make


def experts_of(source, tmp_path, dense=None, harvest=None, num_experts=3, seed=0):
    return source.experts(harvest, dense, num_experts=num_experts, output=tmp_path / "made", seed=seed)


@pytest.mark.parametrize(
    ("source", "steps"),
    [
        (Harvested(), [1, 2, 3, 4, 5]),
        (Harvested("first_half"), [1, 2, 3]),
        (Harvested("second_half"), [3, 4, 5]),
        (Harvested("second_half", base=True), [0, 3, 4, 5]),
    ],
    ids=repr,
)
def test_harvested(tmp_path, source, steps):
    found = experts_of(source, tmp_path, harvest=make_pool(tmp_path / "pool", 5))
    assert [expert.origin["step"] for expert in found] == steps
    assert source.count(5, 8) == len(steps)
    assert list(source.metrics([{1}, {2}, {3}, {4}, {5}], 8)) == [{step} if step else () for step in steps]
    assert found[-1].origin["kind"] == "harvested"
    assert found[-1].origin["source"] == source.describe()


def test_copies_are_the_dense_model(tmp_path, dense):
    found = experts_of(Copies(), tmp_path, dense)
    assert len({expert.sha256 for expert in found}) == 1
    assert len(list((tmp_path / "made").iterdir())) == 1
    for name, param in dense.named_parameters():
        if is_expert(name):
            assert torch.equal(found[2].read(name), param)


def test_noise_has_the_stated_deviation(tmp_path, dense):
    first, second, _ = experts_of(Copies(noise_std=0.1), tmp_path, dense)
    for name, param in dense.state_dict().items():
        if is_expert(name):
            noise, other = first.read(name) - param, second.read(name) - param
            assert float(noise.std() / param.std()) == pytest.approx(0.1, rel=0.1)
            assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.1


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_drop_upcycling_draws_the_same_part_of_all_projections(tmp_path, ratio):
    dense = dense_model("llama", intermediate_size=400)
    expert, other, _ = experts_of(DropUpcycling(ratio), tmp_path, dense)
    weights = dict(dense.named_parameters())
    drawn = {}
    for name in expert.shapes:
        new, old = expert.read(name), weights[name].detach()
        new, old = (new.T, old.T) if "down_proj" in name else (new, old)
        changed = (new != old).any(1)
        assert int(changed.sum()) == int(ratio * 400)
        drawn.setdefault(name.split(".")[2], []).append(changed)
        assert float(new[changed].std()) == pytest.approx(float(old[changed].std()), rel=0.05)
        assert float(new[changed].mean()) == pytest.approx(float(old[changed].mean()), abs=0.05 * float(old.std()))
    for changed in drawn.values():
        assert all(torch.equal(changed[0], each) for each in changed)
    if ratio == 0.25:
        assert not torch.equal(drawn["0"][0], drawn["1"][0])
        assert not torch.equal(expert.read(name), other.read(name))


def test_clones_are_made_once_and_depend_on_the_seed(tmp_path, dense):
    first = experts_of(DropUpcycling(), tmp_path, dense)
    before = [expert.file.stat().st_mtime_ns for expert in first]
    again = experts_of(DropUpcycling(), tmp_path, dense)
    assert [expert.file.stat().st_mtime_ns for expert in again] == before
    other = experts_of(DropUpcycling(), tmp_path, dense, seed=1)
    assert other[0].sha256 != first[0].sha256
    assert experts_of(DropUpcycling(0.4), tmp_path, dense)[0].sha256 != first[0].sha256


def test_checkpoints_from_directories_and_pools(tmp_path):
    harvest, elsewhere = make_pool(tmp_path / "pool", 1), make_pool(tmp_path / "elsewhere", 2)
    model = tmp_path / "model"
    model.mkdir()
    tensors = near(random_ffn(0), 9)
    save_file({**tensors, "model.norm.weight": torch.ones(16)}, model / "model.safetensors")
    source = Checkpoints([str(tmp_path / "mod*"), str(tmp_path / "elsewhere")])
    found = experts_of(source, tmp_path, harvest=harvest)
    assert source.count(1, 8) == len(found) == 3
    assert found[0].origin == {"kind": "checkpoint", "path": str(model), "source": source.describe()}
    assert all(torch.equal(found[0].read(name), tensor) for name, tensor in tensors.items())
    assert [expert.sha256 for expert in found[1:]] == [expert.sha256 for expert in elsewhere.experts]
    where = {"path": str(tmp_path / "elsewhere"), "source": source.describe()}
    assert found[1].origin == {"kind": "harvested", "step": 1, "epoch": 0.25, **where}
    assert not source.whole, "the pool was harvested without the other parameters"
    assert Checkpoints([str(model)]).whole


def test_a_path_that_is_there_may_hold_a_wildcard_s_letters(tmp_path):
    make_pool(tmp_path / "run[1]", 2)
    assert Checkpoints([str(tmp_path / "run[1]")]).count(0, 8) == 2


def test_checkpoints_of_another_shape_are_named(tmp_path):
    make_pool(tmp_path / "pool", 1)
    model = tmp_path / "model"
    model.mkdir()
    tensors = random_ffn(1)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.ones(3, 3)}, model / "model.safetensors")
    with pytest.raises(TensorFileError, match=rf"{model}: tensor '{name}' has shape \(3, 3\), the dense model's"):
        experts_of(Checkpoints([str(model)]), tmp_path, harvest=Pool.load(tmp_path / "pool"))


def saved(path, tokenizer, **fields):
    dense_model("llama", 1, **fields).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Checkpoints([str(path)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, None),
        ({"vocab_size": 65}, r"model/config\.json: vocab_size=65, the dense model has 64"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu', the dense model has 'silu'"),
        ({"intermediate_size": 40}, r"intermediate_size=40, the dense model has 48"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads=4, the dense model has 2"),
        ({"rms_norm_eps": 1e-5}, r"rms_norm_eps=1e-05, the dense model has 1e-06"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, r"rope_theta=1.0, the dense model has 5"),
    ],
)
def test_checkpoints_of_another_model_are_refused_before_the_run(tmp_path, dense, words, fields, message):
    source = saved(tmp_path / "model", words(["a", "b"]), **fields)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        source.check(dense, words(["a", "b"]))


def test_checkpoints_of_another_vocabulary_are_refused_before_the_run(tmp_path, dense, words):
    source = saved(tmp_path / "model", words(["a", "b"]))
    with pytest.raises(ValueError, match=r"model/tokenizer\.json: its vocabulary is not that of the run's"):
        source.check(dense, words(["b", "a"]))


def test_pools_of_another_model_are_refused_before_the_run(tmp_path, dense):
    make_pool(tmp_path / "elsewhere", 2)
    with pytest.raises(TensorFileError, match=r"step_0000001.safetensors: tensor .* the dense model's has \(32, 48\)"):
        Checkpoints([str(tmp_path / "elsewhere")]).check(dense, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: Checkpoints([]), "Checkpoints.paths is empty"),
        (lambda path: Checkpoints([f"{path}/*/export"]), "Checkpoints.paths: nothing is at '.*/export'"),
        (lambda path: Checkpoints([str(path)]), r"Checkpoints\.paths=.* holds neither model.safetensors nor"),
        (lambda path: Copies(-1.0), "Copies.noise_std=-1.0 must not be negative"),
        (lambda path: DropUpcycling(1.5), r"DropUpcycling.ratio=1.5 must lie in \(0, 1\]"),
    ],
)
def test_refuses(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_describe_is_plain(tmp_path):
    for source in (Harvested(), Copies(), DropUpcycling()):
        assert json.loads(json.dumps(source.describe()))["name"] == type(source).__name__
