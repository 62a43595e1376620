"""Expert expansion: whom it pairs, what a child is, what is seeded, reused and chosen."""

import json

import pytest
import torch

from tests.upit.conftest import expert_tensors, shift
from upit.expansion.expand import expand
from upit.expansion.merging import Dare, Linear
from upit.expansion.selection import Even, LastCheckpoints, MostDiverse
from upit.preparation.pool import Pool


def run(pool: Pool, output, num_experts: int, **settings):
    return expand(pool.experts, pool.base, num_experts=num_experts, output=output, **settings)


def flat(expert, base) -> torch.Tensor:
    """The task vector, all tensors in a row."""
    return torch.cat([(expert.read(name) - base.read(name)).double().flatten() for name in base.shapes])


def similarity(experts, base) -> torch.Tensor:
    vectors = torch.nn.functional.normalize(torch.stack([flat(expert, base) for expert in experts]), dim=1)
    return vectors @ vectors.T


def content(expansion) -> list:
    return [[expert.read(name) for name in expert.shapes] for expert in expansion.experts]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.fixture
def pool(dense, tmp_path):
    """A trajectory: each checkpoint goes on from the one before, so neighbours are the most similar."""
    pool = Pool(tmp_path / "experts")
    tensors = expert_tensors(dense)
    pool.set_base(tensors)
    for i in range(4):
        tensors = shift(tensors, 0.1, seed=i)
        pool.add(tensors, step=i + 1, epoch=0.0, metrics={})
    return pool


def test_n_equal_m_is_the_pool_itself(pool, tmp_path):
    expansion = run(pool, tmp_path / "out", 4)
    assert [expert.sha256 for expert in expansion.experts] == [expert.sha256 for expert in pool.experts]
    assert [entry["kind"] for entry in expansion.lineage] == ["harvested"] * 4
    assert [entry["step"] for entry in expansion.lineage] == [1, 2, 3, 4]
    assert [entry["measure"] for entry in expansion.lineage] == [{"name": "Cosine", "against": "base"}] * 4
    assert not list(tmp_path.glob("out/*"))


def test_the_similarity_matrix_is_the_cosine_of_task_vectors(pool, tmp_path):
    expansion = run(pool, tmp_path / "out", 6)
    expected = similarity(expansion.experts, pool.base)
    torch.testing.assert_close(torch.tensor(expansion.similarity).double(), expected, rtol=1e-4, atol=1e-5)


def test_each_round_takes_the_most_dissimilar_pair_that_has_no_child(pool, tmp_path):
    expansion = run(pool, tmp_path / "out", 8)
    matrix = similarity(expansion.experts, pool.base)
    used = set()
    for entry in expansion.lineage[4:]:
        born = entry["expert"]
        pairs = [(j, k) for k in range(born) for j in range(k) if (j, k) not in used]
        expected = min(pairs, key=lambda pair: float(matrix[pair]))
        assert tuple(entry["parents"]) == expected
        used.add(expected)
    assert expansion.lineage[4]["parents"] == [0, 3], "first and last of a trajectory"


def test_a_child_is_alpha_and_beta_of_its_parents_where_nothing_is_dropped(pool, tmp_path):
    expansion = run(pool, tmp_path / "out", 5, merge=Dare(0.0))
    birth = expansion.lineage[-1]
    assert birth["alpha"] + birth["beta"] == 1.0
    assert 0 < birth["alpha"] < 1
    j, k = (expansion.experts[parent] for parent in birth["parents"])
    for name in pool.base.shapes:
        expected = birth["alpha"] * j.read(name) + birth["beta"] * k.read(name)
        torch.testing.assert_close(expansion.experts[-1].read(name), expected, rtol=1e-4, atol=1e-5)


def test_mutation_drops_and_rescales_each_parent_by_itself(pool, tmp_path):
    drop_rate = 0.4
    expansion = run(pool, tmp_path / "out", 5, merge=Dare(drop_rate))
    birth, base = expansion.lineage[-1], pool.base
    parents = [flat(expansion.experts[parent], base) for parent in birth["parents"]]
    terms = [w * p / (1 - drop_rate) for w, p in zip((birth["alpha"], birth["beta"]), parents, strict=True)]
    child = flat(expansion.experts[-1], base)
    outcomes = torch.stack([torch.zeros_like(child), terms[0], terms[1], terms[0] + terms[1]])
    distance, outcome = (child - outcomes).abs().min(0)
    assert distance.max() < 1e-4, "each weight comes from neither, one or both parents, rescaled"
    shares = torch.bincount(outcome, minlength=4) / len(child)
    expected = torch.tensor([0.16, 0.24, 0.24, 0.36])
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)


def test_the_seed_decides_everything(pool, tmp_path):
    one, again, other = (run(pool, tmp_path / name, 6, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert same(content(one), content(again))
    assert [entry.get("alpha") for entry in one.lineage] == [entry.get("alpha") for entry in again.lineage]
    assert one.lineage[-1]["alpha"] != other.lineage[-1]["alpha"]
    assert not same(content(one), content(other))


def test_more_experts_begin_with_the_same_children(pool, tmp_path):
    few, many = run(pool, tmp_path / "few", 5), run(pool, tmp_path / "many", 7)
    assert same(content(few), content(many)[:5])


def test_finished_merges_are_taken_as_they_are(pool, tmp_path):
    first = run(pool, tmp_path / "out", 6)
    files = sorted((tmp_path / "out").glob("merged_*.safetensors"))
    assert len(files) == 2
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    second = run(pool, tmp_path / "out", 6)
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in files] == before
    assert second.lineage == first.lineage
    torch.testing.assert_close(torch.tensor(second.similarity), torch.tensor(first.similarity))


@pytest.mark.parametrize("change", [{"seed": 5}, {"merge": Dare(0.5)}, {"merge": Linear()}], ids=repr)
def test_merges_of_other_settings_are_made_anew(pool, tmp_path, change):
    run(pool, tmp_path / "out", 5)
    changed = run(pool, tmp_path / "out", 5, **change)
    assert same(content(changed), content(run(pool, tmp_path / "fresh", 5, **change)))


def test_merges_of_other_parents_are_made_anew(pool, tmp_path):
    first = run(pool, tmp_path / "out", 5)
    last = pool.experts[-1]
    moved = shift({name: last.read(name) for name in last.shapes}, 1e-4, seed=77)
    pool.add(moved, step=4, epoch=0.0, metrics={})
    changed = run(pool, tmp_path / "out", 5)
    assert changed.lineage[-1]["parents"] == first.lineage[-1]["parents"], "only what they hold has changed"
    assert same(content(changed), content(run(pool, tmp_path / "fresh", 5)))


def test_a_merge_that_crashed_half_way_is_made_anew(pool, tmp_path):
    def crash(items, what=""):
        for i, item in enumerate(items):
            if "merge" in what and i == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        run(pool, tmp_path / "out", 5, track=crash)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert same(content(run(pool, tmp_path / "out", 5)), content(run(pool, tmp_path / "fresh", 5)))


@pytest.mark.parametrize(
    ("selection", "steps"), [(Even(), [2, 4]), (LastCheckpoints(), [3, 4]), (MostDiverse(), [1, 4])]
)
def test_fewer_experts_than_checkpoints_are_selected(pool, tmp_path, selection, steps):
    expansion = run(pool, tmp_path / "out", 2, selection=selection)
    assert [entry["step"] for entry in expansion.lineage] == steps
    assert [entry["expert"] for entry in expansion.lineage] == [0, 1]
    expected = similarity(expansion.experts, pool.base)
    torch.testing.assert_close(torch.tensor(expansion.similarity).double(), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_pools_stay_bfloat16(dense, tmp_path):
    pool = Pool(tmp_path / "experts")
    base = expert_tensors(dense)
    half = {name: tensor.bfloat16() for name, tensor in base.items()}
    pool.set_base(half)
    for i in range(2):
        moved = {name: tensor.bfloat16() for name, tensor in shift(base, 0.1, seed=i).items()}
        pool.add(moved, step=i + 1, epoch=0.0, metrics={})
    child = run(pool, tmp_path / "out", 3).experts[-1]
    assert child.dtype == "bfloat16"
    assert {child.read(name).dtype for name in child.shapes} == {torch.bfloat16}
    child.check()


def test_two_checkpoints_give_any_number(dense, make_pool, tmp_path):
    """More rounds than distinct pairs of the pool at the start."""
    expansion = run(make_pool(dense, 2), tmp_path / "out", 7)
    assert len({expert.sha256 for expert in expansion.experts}) == 7
    json.dumps(expansion.lineage)


def test_no_expert_at_all_is_refused(pool, tmp_path):
    with pytest.raises(ValueError, match="num_experts=0"):
        run(pool, tmp_path / "out", 0)


def test_one_checkpoint_cannot_be_merged(dense, make_pool, tmp_path):
    with pytest.raises(ValueError, match="at least 2 checkpoints"):
        run(make_pool(dense, 1), tmp_path / "out", 3)
