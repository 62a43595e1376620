"""Routing statistics against plain numpy, and the metric over two ranks."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from upit.evaluation.metrics import (
    DomainRouting,
    ExpertLoad,
    WeightedMeans,
    dead_experts,
    domain_shares,
    load,
    load_entropy,
    mutual_information,
    summary,
)

D, E, C, S, K = 3, 5, 4, 40, 2


def routing(seed: int = 0, tokens: int = 300):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(D, tokens, E, generator=generator)
    examples_T = torch.randint(-1, S, (tokens,), generator=generator)
    return [layer.topk(K).indices for layer in logits], examples_T


def metric(**kwargs) -> DomainRouting:
    return DomainRouting(num_layers=D, num_experts=E, domains=[s % C for s in range(S)], num_domains=C, **kwargs)


def naive_counts(expert_ids, examples_T, labels) -> np.ndarray:
    counts = np.zeros((D, E, C), dtype=int)
    for layer in range(D):
        for chosen, example in zip(expert_ids[layer].tolist(), examples_T.tolist(), strict=True):
            for expert in chosen if example >= 0 else ():
                counts[layer, expert, labels[example]] += 1
    return counts


def naive_information(counts) -> float:
    joint = counts / counts.sum()
    total = 0.0
    for e in range(joint.shape[0]):
        for c in range(joint.shape[1]):
            if joint[e, c] > 0:
                total += joint[e, c] * math.log2(joint[e, c] / (joint[e].sum() * joint[:, c].sum()))
    return total


def test_means_are_weighted_and_leave_out_what_has_no_weight():
    means = WeightedMeans(["a", "b", "c"])
    for values, weights in (([1.0, 4.0, 0.0], [1.0, 1.0, 0.0]), ([2.0, 0.0, 0.0], [3.0, 0.0, 0.0])):
        means.update(torch.tensor(values) * torch.tensor(weights), torch.tensor(weights))
    assert {name: float(mean) for name, mean in means.compute().items()} == {"a": 1.75, "b": 4.0}


def test_means_of_two_ranks_with_unequal_weights_equal_one():
    ranks: list[WeightedMeans] = []
    for sums, weights in (([30.0, 0.0], [10.0, 0.0]), ([2.0, 5.0], [2.0, 1.0])):
        gather = {
            "dist_sync_fn": lambda state, group: [r.totals_2N for r in ranks],
            "distributed_available_fn": lambda: True,
        }
        ranks.append(WeightedMeans(["a", "b"], **gather))
        ranks[-1].update(torch.tensor(sums), torch.tensor(weights))
    for rank in ranks:
        assert {name: float(mean) for name, mean in rank.compute().items()} == pytest.approx({"a": 32 / 12, "b": 5.0})
    assert ranks[0].totals() == {"a": [30.0, 10.0], "b": [0.0, 0.0]}, "a rank goes on from its own sums"


def test_means_keep_their_precision_in_a_module_that_is_cast():
    module = torch.nn.Module()
    module.means = WeightedMeans(["a"])
    module.means.update(torch.tensor([1001.0]), torch.tensor([1.0]))
    module.to(torch.bfloat16)
    module.means.update(torch.tensor([1.0]), torch.tensor([1.0]))
    assert float(module.means.compute()["a"]) == 501.0


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_an_update_does_not_wait_for_the_device():
    means, load, routed = WeightedMeans(["a"]), ExpertLoad(D, E), metric()
    expert_ids, examples_T = routing()
    with HostReads() as reads:
        means.update(torch.tensor([1.0]), torch.tensor([1.0]))
        load.update(torch.stack(expert_ids), (examples_T >= 0).float())
        routed.update(expert_ids, examples_T)
        assert reads.count == 0
        means.compute()
        assert reads.count > 0, "reads are seen"


def test_expert_load_equals_the_routing_without_domains():
    expert_ids, examples_T = routing()
    load, routed = ExpertLoad(D, E), metric()
    load.update(torch.stack(expert_ids), (examples_T >= 0).float())
    routed.update(expert_ids, examples_T)
    assert torch.equal(load.compute(), routed.compute()["counts_DEC"].sum(-1).double())


def test_means_go_on_from_a_checkpoint():
    before, after = WeightedMeans(["a", "b"]), WeightedMeans(["b", "c"])
    before.update(torch.tensor([1.0, 6.0]), torch.tensor([1.0, 2.0]))
    after.restore(before.totals())
    after.update(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert {name: float(mean) for name, mean in after.compute().items()} == {"b": 3.0}


def test_counts_equal_a_loop_and_leave_padding_out():
    expert_ids, examples_T = routing()
    counted = metric()
    counted.update(expert_ids, examples_T)
    expected = naive_counts(expert_ids, examples_T, [s % C for s in range(S)])
    np.testing.assert_array_equal(counted.compute()["counts_DEC"].numpy(), expected)


def test_statistics_equal_numpy():
    counts = torch.randint(0, 50, (D, E, C), generator=torch.Generator().manual_seed(1))
    for layer in range(D):
        own = counts[layer].numpy()
        share = own.sum(1) / own.sum()
        assert float(load_entropy(counts)[layer]) == pytest.approx(-(share * np.log(share)).sum() / math.log(E))
        assert float(mutual_information(counts)[layer]) == pytest.approx(naive_information(own))
        np.testing.assert_allclose(load(counts)[layer].numpy(), share * E)
        np.testing.assert_allclose(domain_shares(counts)[layer].numpy(), own / own.sum(0))


def test_mutual_information_at_its_ends():
    assert float(mutual_information(10 * torch.eye(4, dtype=torch.int64))) == pytest.approx(2.0)
    assert float(mutual_information(torch.ones(4, 4, dtype=torch.int64))) == pytest.approx(0.0, abs=1e-12)


def test_dead_experts_are_those_far_below_an_even_share():
    counts = torch.tensor([[1000], [1000], [4], [0]])
    assert int(dead_experts(counts)) == 2
    assert float(load_entropy(torch.tensor([[7], [0], [0]]))) == 0.0


def test_shuffled_baseline_keeps_examples_whole():
    """Every example has an expert of its own, no domain has: only shuffling whole examples shows that it is chance."""
    examples_T = torch.arange(S).repeat_interleave(50)
    expert_ids = [(examples_T % E)[:, None]] * D
    counted = DomainRouting(
        num_layers=D, num_experts=E, domains=[(s // E) % C for s in range(S)], num_domains=C, shuffles=64
    )
    counted.update(expert_ids, examples_T)
    result = counted.compute()
    by_token = (E - 1) * (C - 1) / (2 * len(examples_T) * math.log(2))  # what shuffled tokens would give
    assert float(result["shuffled_D"].mean()) > 10 * by_token
    assert float(mutual_information(result["counts_DEC"]).mean()) < float(result["shuffled_D"].mean())


def test_two_ranks_equal_one():
    """The ranks' metrics gather each other's states, as torch.distributed would."""
    one, ranks = metric(), []
    for rank in range(2):
        expert_ids, examples_T = routing(seed=rank)
        one.update(expert_ids, examples_T)
        ranks.append(
            metric(
                dist_sync_fn=lambda state, group: [other.counts_RDEC for other in ranks],
                distributed_available_fn=lambda: True,
            )
        )
        ranks[rank].update(expert_ids, examples_T)
    expected = one.compute()
    for rank in ranks:
        for name, value in rank.compute().items():
            torch.testing.assert_close(value, expected[name])


def test_summary_is_plain_numbers():
    expert_ids, examples_T = routing()
    counted = metric()
    counted.update(expert_ids, examples_T)
    numbers = summary(**counted.compute())
    assert all(isinstance(value, float) for value in numbers.values())
    assert numbers["dead_experts"] == 0.0
    assert numbers["max_load"] >= 1.0
