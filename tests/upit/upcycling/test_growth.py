"""More experts later: what is kept, what is merged, and why the routing hardly changes."""

from types import SimpleNamespace

import pytest
import torch

from tests.upit.tiny import dense_model, expert_of
from upit.expansion.expand import expand
from upit.expansion.merging import Linear
from upit.model.families import FAMILIES, grown_config, moe_config
from upit.model.loading.build import build
from upit.preparation.pool import Pool
from upit.upcycling.assemble import upcycle
from upit.upcycling.growth import MergedRows, RandomRows, router_of, trained_experts

BEFORE, AFTER = 3, 6
LINEAGE = [{"expert": e, "kind": "harvested", "step": e, "epoch": 0.0, "file": "f", "sha256": "s"} for e in range(3)]


def logits(model) -> torch.Tensor:
    ids = torch.randint(3, 64, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


def choices(model) -> torch.Tensor:
    """First and second expert of every token in every layer, of the last pass: (D, T, 2)."""
    return torch.stack([layer.mlp.gate.last_experts for layer in model.model.layers])


def grow(family: str, folder, *, top_k: int = 2, rows=None, **expansion) -> SimpleNamespace:
    """A random "trained" MoE, and the one it grows to."""
    torch.manual_seed(1)
    dense = dense_model(family)
    base = expert_of(dense, folder / "base.safetensors")
    old = build(moe_config(dense.config, num_experts=BEFORE, top_k=top_k)).eval()
    upcycle(old, dense, [base] * BEFORE, torch.randn(2, BEFORE, 32))
    with torch.no_grad():
        for name, param in old.named_parameters():
            if "shared_expert" not in name:
                param.add_(0.1 * torch.randn_like(param))
    kept = trained_experts(old, LINEAGE, folder / "experts", step=9, epoch=2.0)
    grown = expand(kept, base, num_experts=AFTER, output=folder / "experts", **expansion)
    router_DNH = router_of(old)
    new_rows = (rows or MergedRows())(router_DNH, grown.lineage, old.config, seed=0)
    new = build(grown_config(old.config, num_experts=AFTER)).eval()
    upcycle(new, old, grown.experts, torch.cat([router_DNH, new_rows], dim=1))
    return SimpleNamespace(base=base, old=old, new=new, kept=kept, expansion=grown, rows=new_rows)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_was_trained_is_kept_bit_for_bit(family, tmp_path):
    run = grow(family, tmp_path)
    assert run.new.config.num_experts == AFTER
    assert run.old.config.num_experts == BEFORE
    theirs = dict(run.old.named_parameters())
    for name, param in run.new.named_parameters():
        assert torch.equal(param[:BEFORE] if param.shape != theirs[name].shape else param, theirs[name]), name


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_new_experts_are_merges_of_the_trained_ones_and_so_are_their_rows(family, tmp_path):
    run = grow(family, tmp_path, merge=Linear())
    for e, entry in enumerate(run.expansion.lineage[BEFORE:], start=BEFORE):
        (j, k), alpha, beta = entry["parents"], entry["alpha"], entry["beta"]
        for layer in run.new.model.layers:
            for fused in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.mlp.gate.weight):
                torch.testing.assert_close(fused[e], alpha * fused[j] + beta * fused[k])


def test_the_task_vectors_start_at_the_harvested_base(tmp_path):
    """DARE keeps a parameter at the base, or takes the parents' task vectors rescaled: nothing in between."""
    run = grow("llama", tmp_path)
    entry = run.expansion.lineage[BEFORE]
    name = "model.layers.0.mlp.down_proj.weight"
    origin = run.base.read(name)
    j, k = (
        weight * (run.kept[p].read(name) - origin) / 0.8
        for p, weight in zip(entry["parents"], (entry["alpha"], entry["beta"]), strict=True)
    )
    child = run.expansion.experts[BEFORE].read(name) - origin
    apart = torch.stack([child, child - j, child - k, child - j - k]).abs().amin(0)
    assert apart.max() < 1e-5


def test_no_token_changes_its_first_expert_and_a_new_second_descends_from_it(tmp_path):
    """A merged row's logit lies between its parents', so it can't win; it comes second only beside an ancestor."""
    run = grow("llama", tmp_path)
    with torch.no_grad():
        for model in (run.old, run.new):
            for name, param in model.named_parameters():
                if ".experts." in name:
                    param.zero_()  # the experts say nothing: every layer sees the same hidden states in both
    logits(run.old), logits(run.new)
    before_DTK, after_DTK = choices(run.old), choices(run.new)
    assert torch.equal(before_DTK[..., 0], after_DTK[..., 0])
    joined = after_DTK[after_DTK[..., 1] >= BEFORE].tolist()
    assert joined
    assert all(first in ancestors(second, run.expansion.lineage) for first, second in joined)
    stayed = after_DTK[..., 1] < BEFORE
    assert torch.equal(before_DTK[stayed], after_DTK[stayed])


def ancestors(expert: int, lineage) -> set[int]:
    parents = lineage[expert].get("parents", [])
    return {*parents, *(a for parent in parents for a in ancestors(parent, lineage))}


def test_with_one_expert_a_token_nothing_changes(tmp_path):
    run = grow("llama", tmp_path, top_k=1)
    torch.testing.assert_close(logits(run.new), logits(run.old))


def test_random_rows_leave_the_trained_ones_alone(tmp_path):
    run = grow("llama", tmp_path, rows=RandomRows())
    assert run.rows.shape == (2, AFTER - BEFORE, 32)
    assert torch.equal(router_of(run.new)[:, :BEFORE], router_of(run.old))
    assert not torch.allclose(run.rows, MergedRows()(router_of(run.old), run.expansion.lineage, run.old.config))


def test_the_trained_experts_go_on_in_the_lineage_and_make_a_pool(tmp_path):
    run = grow("llama", tmp_path)
    assert [entry["step"] for entry in run.expansion.lineage[:BEFORE]] == [0, 1, 2]
    assert {entry["trained_to"] for entry in run.expansion.lineage[:BEFORE]} == {9}
    assert [entry["file"].rpartition("/")[2] for entry in run.expansion.lineage][:4] == [
        "trained_00.safetensors", "trained_01.safetensors", "trained_02.safetensors", "merged_00.safetensors",
    ]  # fmt: skip
    pool = Pool(tmp_path / "experts")
    pool.gather(run.base, run.expansion.experts)
    pool.verify()
    assert [expert.origin for expert in pool.experts] == [expert.origin for expert in run.expansion.experts]
