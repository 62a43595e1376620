"""What choices return is checked where it is used; the error names the class and what was expected."""

import pytest
import torch

from tests.upit.conftest import make_data
from upit.expansion.expand import expand
from upit.expansion.merging import Linear, Merge
from upit.expansion.selection import MostDissimilar, Parents, Selection
from upit.expansion.similarity import Cosine
from upit.model.families import moe_config
from upit.model.loading.build import build
from upit.offline.standalone import initialise
from upit.preparation.checks import checked_pair, checked_pool, checked_rows
from upit.preparation.sources import Harvested
from upit.router_init import RandomRouter
from upit.router_init.base import WithoutData
from upit.router_init.scoring import SeedScorer
from upit.router_init.seeds import Assignment
from upit.upcycling.assemble import upcycle


@pytest.fixture
def pool(dense, make_pool):
    return make_pool(dense, 3)


def run(pool, tmp_path, num_experts=4, **choices):
    return expand(pool.experts, pool.base, num_experts=num_experts, output=tmp_path / "made", **choices)


def own(base: type, **methods):
    """An instance of a user's class that does something else."""
    return type("Own", (base,), {"__module__": __name__, **methods})()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda t, *_: t[0].double(), "float64 on cpu, expected torch.float32"),
        (lambda t, *_: t[0][:-1], "of shape .* as the parents'"),
        (lambda t, *_: t[0].numpy(), "returned ndarray, expected"),
        (lambda t, *_: t[0].long(), "int64"),
        (lambda t, *_: t[0] / 0, "is not finite.*merged_00.safetensors: tensor 'model.layers.0"),
    ],
    ids=["dtype", "shape", "array", "integers", "infinite"],
)
def test_a_merge_is_named_with_its_tensor(pool, tmp_path, wrong, message):
    merge = own(Merge, __call__=lambda self, *args: wrong(*args))
    with pytest.raises(ValueError, match=rf"tests\.upit\.preparation\.test_checks\.Own.*{message}"):
        run(pool, tmp_path, merge=merge)
    assert not list((tmp_path / "made").glob("*.safetensors"))


def test_a_strategy_that_holds_a_tensor_is_named_before_any_work(pool, tmp_path):
    merge = own(Linear)
    merge.mask = torch.ones(3)
    with pytest.raises(ValueError, match=r"merge=.*Own: its mask can't be written to the lineage .*override describe"):
        run(pool, tmp_path, merge=merge)
    assert not (tmp_path / "made").exists()
    merge.mask = float("nan")
    with pytest.raises(ValueError, match="its mask can't be written"):
        run(pool, tmp_path, merge=merge)


def test_a_strategy_may_hold_others_and_describes_them(pool, tmp_path):
    merge = own(Linear)
    merge.parts = [Linear(), {"then": Linear()}]
    described = {"name": "Own", "parts": [{"name": "Linear"}, {"then": {"name": "Linear"}}]}
    assert run(pool, tmp_path, merge=merge).lineage[-1]["merge"] == described
    assert len(merge.key()["code"]) == 3


@pytest.mark.parametrize("pair", [(1, 1), (0, 3), (-1, 0), (0, 1, 2), None, 2])
def test_parents_are_two_different_experts(pool, tmp_path, pair):
    parents = own(Parents, cost=lambda self, *_: None, choose=lambda self, *_, **__: pair)
    with pytest.raises(ValueError, match=r"Own chose the parents .*expected two different experts of 0 to 2"):
        run(pool, tmp_path, parents=parents)


@pytest.mark.parametrize("cost", [torch.full((3, 3), torch.nan), torch.zeros(3), torch.zeros(2, 2)])
def test_the_cost_of_parents_is_a_number_for_each_pair(pool, tmp_path, cost):
    with pytest.raises(ValueError, match=r"Own\.cost returned shape .*expected a number for each pair, \(3, 3\)"):
        run(pool, tmp_path, parents=own(Parents, cost=lambda self, *_: cost))


@pytest.mark.parametrize("chosen", [[0, 0], [0], [0, 1, 2], [0, 3], [-1, 0]])
def test_a_selection_has_as_many_different_experts_as_wanted(pool, tmp_path, chosen):
    with pytest.raises(ValueError, match=r"Own selected .*expected 2 different experts of 0 to 2"):
        run(pool, tmp_path, num_experts=2, selection=own(Selection, choose=lambda self, *_: chosen))


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("products", torch.ones(3, 2, dtype=torch.float64), r"inner products of shape \(3, 2\), expected \(3, 3\)"),
        ("products", torch.full((3, 3), torch.inf), "inner products with NaN or infinity"),
        ("matrix", torch.ones(3), r"similarities of shape \(3,\)"),
        ("matrix", torch.full((3, 3), torch.nan), "similarities with NaN"),
        ("matrix", torch.arange(9.0).view(3, 3), "not symmetric"),
    ],
)
def test_a_similarity_is_square_symmetric_and_finite(pool, tmp_path, method, value, message):
    with pytest.raises(ValueError, match=f"Own returned .*{message}"):
        run(pool, tmp_path, similarity=own(Cosine, **{method: lambda self, *_, **__: value}))


@pytest.mark.parametrize(
    ("assigned", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0, 1]), r"assigned examples to experts \[3\]"),
        (torch.tensor([0, 1, -1, 2, 0, 1]), r"assigned examples to experts \[-1\]"),
        (torch.tensor([0, 1, 2]), r"returned \(3,\), expected a tensor of shape \(6,\)"),
        (torch.zeros(6, 1, dtype=torch.long), r"returned \(6, 1\)"),
        (torch.zeros(6), "returned torch.float32, expected integers"),
        ([0, 1, 2, 0, 1, 2], "returned list"),
    ],
)
def test_an_assignment_names_an_expert_for_each_example(dense, pool, tmp_path, assigned, message):
    scorer = SeedScorer(dense, range(6), make_data(6), file=tmp_path / "seeds.json")
    with pytest.raises(ValueError, match=f"Own {message}"):
        scorer.assign(pool.experts, own(Assignment, __call__=lambda self, *_: assigned))


def test_experts_without_seed_examples_are_reported(dense, pool, tmp_path):
    scorer = SeedScorer(dense, range(6), make_data(6), file=tmp_path / "seeds.json")
    all_to_one = own(Assignment, __call__=lambda self, p, g: torch.ones(len(p), dtype=torch.int32))
    with pytest.warns(UserWarning, match=r"Own gives no seed example to the experts \[0, 2\]"):
        seeds = scorer.assign(pool.experts, all_to_one)
    assert seeds.counts == [0, 6, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(2, 1, 32), r"shape \(2, 1, 32\), expected \(2, 3, 32\) \(layers, experts, hidden\)"),
        (torch.zeros(2, 4, 32), r"shape \(2, 4, 32\)"),
        (torch.zeros(2, 3, 32, dtype=torch.long), "int64"),
        (torch.zeros(2, 3, 32).index_fill(0, torch.tensor(1), torch.nan), r"NaN or infinity in layers \[1\]"),
        (torch.zeros(2, 3, 32, device="meta"), "without data"),
        (None, "NoneType"),
    ],
    ids=["broadcast", "more experts", "integers", "nan", "meta", "none"],
)
def test_rows_of_a_router_are_exactly_those_of_all_layers(dense, pool, tmp_path, rows, message):
    router = own(WithoutData, weights=lambda self, *_, **__: rows)
    settings = {"seed_fraction": 0.1, "assignment": None, "seed": 0, "directory": tmp_path, "track": lambda x, _: x}
    with pytest.raises(ValueError, match=f"Own returned .*{message}"):
        initialise(router, lambda: dense, pool.experts, dense.config, None, **settings)


def test_rows_of_any_float_end_in_float32_on_the_cpu():
    rows = checked_rows(RandomRouter(), torch.ones(2, 3, 4, dtype=torch.float64, requires_grad=True), (2, 3, 4))
    assert (rows.dtype, rows.requires_grad) == (torch.float32, False)


def test_a_moe_is_filled_by_a_router_of_its_own_shape(dense, pool):
    moe = build(moe_config(dense.config, num_experts=3, top_k=2))
    with pytest.raises(ValueError, match=r"router_DEH has shape \(2, 1, 32\), expected \(2, 3, 32\)"):
        upcycle(moe, dense, pool.experts, torch.zeros(2, 1, 32))


def test_a_source_gives_as_many_experts_as_it_announced_and_of_the_base_s_shapes(pool):
    shapes = pool.base.shapes
    assert checked_pool(Harvested(), pool.experts, 3, shapes) == pool.experts
    with pytest.raises(ValueError, match=r"Harvested gave 3 experts, its count\(\) announced 4"):
        checked_pool(Harvested(), pool.experts, 4, shapes)
    name = next(iter(shapes))
    with pytest.raises(ValueError, match=rf"Harvested: tensor '{name}' of expert 0 .* the base's has \(1, 1\)"):
        checked_pool(Harvested(), pool.experts, 3, {**shapes, name: (1, 1)})


def test_parents_keep_their_order():
    assert checked_pair(MostDissimilar(), (2, 0), 3) == (2, 0)
