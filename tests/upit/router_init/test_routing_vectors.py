"""Routing vectors: what the pre-optimisation raises, what its settings do, and what is reused."""

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.upit.conftest import expert_tensors, make_data
from upit.core.batches import PADDING, collate
from upit.model.forward import ffn_inputs_of, response_logits
from upit.preparation.placement import load_experts
from upit.router_init import RoutingVectors, routing_vectors, scoring
from upit.router_init.routing_vectors import optimise_routing_vectors
from upit.router_init.scoring import SeedScorer
from upit.router_init.seeds import LowestPerplexity

DATA = make_data(12)
BUCKET = [0, 2, 3, 5, 8]


def optimise(dense, bucket=BUCKET, **kwargs):
    return optimise_routing_vectors(dense, bucket, DATA.train_set, pad_id=0, **{"lr": 1e-2, **kwargs})


@torch.no_grad()
def attraction(dense, vectors_DH, bucket=BUCKET) -> float:
    """Mean of sigmoid(h . r) over the bucket's tokens and the layers."""
    batch = collate([[i] for i in bucket], DATA.train_set, pad_id=0)
    with ffn_inputs_of(dense) as inputs:
        response_logits(dense, batch)
    real = batch["example_ids"] != PADDING
    return float(torch.stack([(h[real] @ r).sigmoid().mean() for h, r in zip(inputs, vectors_DH, strict=True)]).mean())


@torch.no_grad()
def lm_loss(dense) -> float:
    logits, targets, _ = response_logits(dense, collate([[i] for i in BUCKET], DATA.train_set, pad_id=0))
    return float(torch.nn.functional.cross_entropy(logits, targets))


def test_the_vectors_learn_their_own_bucket(dense):
    start = optimise(dense, epochs=0)
    trained = optimise(dense, epochs=20)
    assert attraction(dense, trained) > max(0.8, attraction(dense, start) + 0.2)
    assert attraction(dense, optimise(dense, epochs=40)) > attraction(dense, trained)


def test_alpha_one_leaves_the_vectors_and_alpha_zero_does_not(dense):
    start = optimise(dense, epochs=0)
    assert torch.equal(optimise(dense, alpha=1.0), start)
    assert not torch.equal(optimise(dense, alpha=0.0), start)


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_without_an_expert_rate_no_parameter_of_the_model_moves(dense, alpha):
    before = {name: param.clone() for name, param in dense.named_parameters()}
    optimise(dense, alpha=alpha, expert_lr=None)
    for name, param in dense.named_parameters():
        assert torch.equal(param, before[name]), name
        assert param.grad is None or not param.grad.any(), "a gradient would leak into the run's optimizer"


def test_with_an_expert_rate_exactly_the_experts_move_and_the_language_is_learned(dense):
    before = {name: param.clone() for name, param in dense.named_parameters()}
    loss = lm_loss(dense)
    optimise(dense, alpha=0.9, expert_lr=1e-2, epochs=8)
    moved = {name for name, param in dense.named_parameters() if not torch.equal(param, before[name])}
    assert moved == set(expert_tensors(dense))
    assert lm_loss(dense) < loss
    assert all(param.grad is None or not param.grad.any() for param in dense.parameters())


def test_the_seed_decides_start_and_order(dense):
    assert torch.equal(optimise(dense, seed=3), optimise(dense, seed=3))
    assert not torch.equal(optimise(dense, seed=3, epochs=0), optimise(dense, seed=4, epochs=0))


def test_an_empty_bucket_gives_the_starting_vectors(dense):
    assert torch.equal(optimise(dense, bucket=[], seed=1), optimise(dense, seed=1, epochs=0))


def optimise_on_rank(rank: int, folder: Path, dense) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dense = copy.deepcopy(dense)  # the two processes share the memory of what they were given
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    vectors_DH = optimise(dense, expert_lr=1e-2, batch_size=4)
    torch.save({"vectors": vectors_DH, **expert_tensors(dense)}, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_whole_parameters_equal_one(dense, tmp_path):
    """As under DDP: nothing but the pre-optimisation itself averages the experts' gradients."""
    mp.spawn(optimise_on_rank, (tmp_path, dense), nprocs=2)
    one = {"vectors": optimise(dense, expert_lr=1e-2, batch_size=4), **expert_tensors(dense)}
    two = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], tensor, rtol=1e-3, atol=1e-4)


def test_padding_does_not_count(dense):
    """A batch of unlike lengths against the same examples one a batch: the same mean over real tokens."""
    one_step = optimise(dense, bucket=[0, 2], batch_size=2, epochs=1, alpha=0.0)
    data = [{**DATA.train_set[i], "input_ids": DATA.train_set[i]["input_ids"]} for i in range(12)]
    longer = {**data[0], "input_ids": data[0]["input_ids"] + [9] * 20, "labels": data[0]["labels"] + [-100] * 20}
    padded = optimise_routing_vectors(
        dense, [0, 2], [longer, *data[1:]], pad_id=0, lr=1e-2, batch_size=2, epochs=1, alpha=0.0
    )
    assert not torch.equal(one_step, padded), "tokens count"
    other_pad = optimise_routing_vectors(
        dense, [0, 2], DATA.train_set, pad_id=7, lr=1e-2, batch_size=2, epochs=1, alpha=0.0
    )
    assert torch.equal(one_step, other_pad), "padding does not"


@pytest.fixture
def setting(dense, make_pool, tmp_path):
    experts = make_pool(dense, 3).experts
    scorer = SeedScorer(dense, range(12), DATA, file=tmp_path / "seeds.json")
    return dense, experts, scorer.assign(experts, LowestPerplexity())


@pytest.fixture
def trainings(monkeypatch):
    """Counts pre-optimisations."""
    seen = []
    original = routing_vectors.optimise_routing_vectors
    monkeypatch.setattr(
        routing_vectors, "optimise_routing_vectors", lambda *a, **k: seen.append(1) or original(*a, **k)
    )
    return seen


def initialise(setting, directory, seed=0, **changes):
    dense, experts, seeds = setting
    router = RoutingVectors(**{"epochs": 2, "lr": 1e-2, "batch_size": 4, **changes})
    return router(dense, experts, seeds, DATA, directory=directory, seed=seed)


def test_every_row_of_the_router_prefers_its_own_bucket(setting, tmp_path):
    dense, _, seeds = setting
    experts, router_DEH = initialise(setting, tmp_path / "router", epochs=40)
    assert router_DEH.shape == (2, 3, 32)
    for e, expert in enumerate(experts):
        next(load_experts(dense, [expert]))
        assert attraction(dense, router_DEH[:, e], seeds.bucket(e)) > 0.8


@pytest.mark.parametrize("expert_lr", [None, 1e-3])
def test_finished_vectors_are_reused(setting, tmp_path, trainings, expert_lr):
    first = initialise(setting, tmp_path / "router", expert_lr=expert_lr)
    assert len(trainings) == 3
    second = initialise(setting, tmp_path / "router", expert_lr=expert_lr)
    assert len(trainings) == 3
    assert torch.equal(first[1], second[1])
    assert first[0] == second[0]
    for expert in second[0]:
        expert.check()
    if expert_lr:
        assert all(new.sha256 != old.sha256 for new, old in zip(first[0], setting[1], strict=True))


@pytest.mark.parametrize(
    "change", [{"lr": 1e-3}, {"alpha": 0.2}, {"epochs": 3}, {"seed": 9}, {"batch_size": 2}, {"expert_lr": 1e-3}]
)
def test_vectors_of_other_settings_are_made_anew(setting, tmp_path, trainings, change):
    initialise(setting, tmp_path / "router")
    changed = initialise(setting, tmp_path / "router", **change)
    assert len(trainings) == 6
    assert torch.equal(changed[1], initialise(setting, tmp_path / "fresh", **change)[1])


@pytest.mark.parametrize(("file", "expert_lr"), [("vectors_01", None), ("vectors_01", 1e-3), ("expert_01", 1e-3)])
def test_a_damaged_file_is_made_again_and_said(setting, tmp_path, trainings, file, expert_lr):
    first = initialise(setting, tmp_path / "router", expert_lr=expert_lr)
    content = bytearray((tmp_path / f"router/{file}.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / f"router/{file}.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{file}\.safetensors' is damaged"):
        second = initialise(setting, tmp_path / "router", expert_lr=expert_lr)
    assert len(trainings) == 4
    assert torch.equal(first[1], second[1])
    for expert in second[0]:
        expert.check()


def test_vectors_of_other_tokens_under_the_same_ids_are_made_anew(setting, tmp_path, trainings):
    initialise(setting, tmp_path / "router")
    dense, experts, seeds = setting
    index = seeds.bucket(1)[0]
    edited = [{**example, "input_ids": [*example["input_ids"]]} for example in DATA.train_set]
    edited[index]["input_ids"][0] += 1
    data = SimpleNamespace(train_set=edited, tokenizer=DATA.tokenizer)
    RoutingVectors(epochs=2, lr=1e-2, batch_size=4)(dense, experts, seeds, data, directory=tmp_path / "router")
    assert len(trainings) == 4


def test_vectors_of_another_state_are_made_anew(setting, tmp_path, trainings):
    """The final norm stands still, as it does in bf16-true or when frozen."""
    initialise(setting, tmp_path / "router")
    with torch.no_grad():
        setting[0].model.layers[0].self_attn.v_proj.weight[3, 5] += 1e-3
    initialise(setting, tmp_path / "router")
    assert len(trainings) == 6


def test_a_crash_keeps_the_vectors_finished_before_it(setting, tmp_path, monkeypatch, trainings):
    original = routing_vectors.optimise_routing_vectors

    def crash(*args, **kwargs):
        if len(trainings) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(routing_vectors, "optimise_routing_vectors", crash)
        with pytest.raises(KeyboardInterrupt):
            initialise(setting, tmp_path / "router")
    resumed = initialise(setting, tmp_path / "router")
    assert len(trainings) == 3
    assert torch.equal(resumed[1], initialise(setting, tmp_path / "fresh")[1])


@pytest.mark.parametrize("wrong", [{"alpha": 1.5}, {"epochs": 0}, {"lr": 0.0}, {"expert_lr": -1.0}, {"batch_size": 0}])
def test_impossible_settings_are_refused(wrong):
    field, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"RoutingVectors.{field}={value} must"):
        RoutingVectors(**wrong)


def test_hidden_states_are_computed_once_where_they_fit(dense, monkeypatch):
    passes = []
    original = scoring.response_states
    monkeypatch.setattr(scoring, "response_states", lambda *a: passes.append(1) or original(*a))
    kept = optimise(dense, range(6), epochs=3, batch_size=2)
    assert len(passes) == 1
    monkeypatch.setattr(routing_vectors, "STATES_BYTES", 0)
    again = optimise(dense, range(6), epochs=3, batch_size=2)
    assert len(passes) == 1 + 3 * 3
    torch.testing.assert_close(kept, again)
