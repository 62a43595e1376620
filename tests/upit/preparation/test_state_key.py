"""The key of a model's state: every parameter of no expert counts, experts do not, and shards give the same key."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.upit.conftest import make_examples
from upit.model.families import is_expert
from upit.preparation.state_key import content_sums, examples_key, state_key


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
)
@torch.no_grad()
def test_the_smallest_change_of_any_parameter_of_no_expert_counts(dense, name):
    dense.bfloat16()
    before = state_key(dense)
    assert state_key(dense) == before
    param = dense.get_parameter(name).view(torch.int16)
    param.view(-1)[7] ^= 1
    assert state_key(dense) != before
    param.view(-1)[7] ^= 1
    assert state_key(dense) == before


@torch.no_grad()
def test_the_experts_do_not_count(dense):
    before = state_key(dense)
    for name, param in dense.named_parameters():
        if is_expert(name):
            param.mul_(2)
    assert state_key(dense) == before


def test_places_and_signs_count():
    tensor = torch.randn(6, 5)
    changed = [tensor.flip(0), tensor.flip(1), -tensor, tensor.t().reshape(6, 5), tensor.view(-1).roll(1).view(6, 5)]
    sums = [content_sums({"a": one})["a"] for one in (tensor, *changed)]
    assert len(set(sums)) == len(sums)
    assert content_sums({"a": tensor.clone()}) == {"a": sums[0]}


def test_the_precision_of_the_passes_counts(dense):
    assert state_key(dense, nullcontext) != state_key(dense, lambda: torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_size_of_element_and_any_pieces(dtype, monkeypatch):
    tensor = torch.randn(7, 3, 2).to(dtype)
    whole = content_sums({"a": tensor, "scalar": torch.tensor(2.0, dtype=dtype)})
    monkeypatch.setattr("upit.preparation.state_key.PIECE", {"cpu": 4})
    assert content_sums({"a": tensor, "scalar": torch.tensor(2.0, dtype=dtype)}) == whole


def key_on_rank(rank: int, folder: Path, dense) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from upit.model.sharding import shard

    whole = state_key(dense)
    mesh, odd = init_device_mesh("cpu", (2,)), torch.arange(15.0).view(3, 5)
    shards = [content_sums({"a": distribute_tensor(odd, mesh, [how])}) for how in (Shard(0), Shard(1), Replicate())]
    shard(dense, mesh)
    torch.save([whole, state_key(dense), *shards], folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_key_of_one(dense, tmp_path):
    expected, odd = state_key(dense), content_sums({"a": torch.arange(15.0).view(3, 5)})
    mp.spawn(key_on_rank, (tmp_path, dense), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"rank_{rank}.pt") == [expected, expected, odd, odd, odd]


def test_tokens_and_labels_of_examples_count_and_their_order():
    examples = make_examples(3)
    key = examples_key(examples)
    assert examples_key([{**example, "id": "another", "domain": "x"} for example in examples]) == key
    assert examples_key(examples[::-1]) != key
    for column in ("input_ids", "labels"):
        changed = [{**example, column: [*example[column]]} for example in examples]
        changed[1][column][-1] += 1
        assert examples_key(changed) != key
