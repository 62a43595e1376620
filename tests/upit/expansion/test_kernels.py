"""Expansion on a GPU: inner products against float64, DARE by its own masks, and a whole expansion."""

from contextlib import closing

import pytest
import torch

from tests.upit.pools import flat, make_pool, near, random_ffn
from upit.core.tensor_files import TensorFileError
from upit.expansion import expand as expansion
from upit.expansion.device_cache import Residence
from upit.expansion.expand import expand
from upit.expansion.merging import DareTies, Linear, Slerp, Ties, dare_linear, drop_mask
from upit.expansion.similarity import Cosine, Euclidean
from upit.preparation.pool import Pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = (64 * 4096, 100_003, 40)  # whole tiles, half a tile, less than one
WEIGHTS = [0.3, 0.7]


def family(count, size, dtype, seed=0):
    """A base and parameters near it."""
    generator = torch.Generator("cuda").manual_seed(seed)
    base = torch.randn(size, generator=generator, device="cuda")
    moved = [base + 0.02 * torch.randn(size, generator=generator, device="cuda") for _ in range(count)]
    return base.to(dtype), [tensor.to(dtype) for tensor in moved]


@pytest.mark.parametrize(
    ("count", "size", "dtype", "against_base"),
    [
        (1, 100_003, torch.float32, True),
        (2, 100_003, torch.float32, True),
        (2, 40, torch.bfloat16, False),
        (5, 100_003, torch.bfloat16, True),
        (5, 64 * 4096, torch.float32, False),
        (8, 64 * 4096, torch.bfloat16, True),
        (8, 100_003, torch.bfloat16, True),
        (8, 100_003, torch.float32, False),
        (9, 100_003, torch.bfloat16, True),
        (9, 64 * 4096, torch.float32, True),
        (11, 100_003, torch.bfloat16, True),
        (16, 64 * 4096, torch.bfloat16, True),
        (16, 40, torch.float32, True),
        (17, 100_003, torch.float32, False),
        (32, 100_003, torch.float16, True),
        (40, 100_003, torch.bfloat16, False),
    ],
)
def test_products_are_those_of_float64(count, size, dtype, against_base):
    from upit.expansion.kernels import products

    base, tensors = family(count, size, dtype)
    deltas = torch.stack([t.double() - (base.double() if against_base else 0) for t in tensors])
    expected = deltas @ deltas.T
    norms = expected.diagonal().sqrt()
    for new in (count, 1):
        found = products(tensors, base if against_base else None, new=new)
        error = (found - expected[-new:]) / (norms[-new:, None] * norms)
        assert found.dtype == torch.float64
        # tensor cores keep 16 of float32's 24 bits in each factor, twice over
        assert error.abs().max() < (1e-5 if new > 8 else 2e-6)


def test_products_of_experts_of_different_dtypes():
    from upit.expansion.kernels import products

    base, tensors = family(3, 1000, torch.float32)
    tensors[1] = tensors[1].bfloat16()
    deltas = torch.stack([tensor.double() - base.double() for tensor in tensors])
    torch.testing.assert_close(products(tensors, base, new=3), deltas @ deltas.T, rtol=1e-5, atol=1e-5)


def dare(*args, **kwargs):
    from upit.expansion.kernels import dare

    return dare(*args, **{"drop_rate": 0.2, "seed": 2**61 + 3, **kwargs})


def masks(size, **kwargs):
    """What DARE keeps of each parent: where the other is the base, and this one differs from it."""
    base, moved = torch.zeros(size, device="cuda"), torch.ones(size, device="cuda")
    return [dare(pair, [1.0, 1.0], base, **kwargs) > 0 for pair in ((moved, base), (base, moved))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop_rate", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("size", SIZES)
def test_dare_is_the_plain_one_under_its_own_masks(dtype, drop_rate, size):
    base, parents = family(2, size, dtype)
    found = dare(parents, WEIGHTS, base, drop_rate=drop_rate)
    exact = dare_linear(
        [parent.double() for parent in parents], WEIGHTS, base.double(), drop_rate=drop_rate,
        masks=masks(size, drop_rate=drop_rate),
    )  # fmt: skip
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    dropped = ~torch.stack(masks(size, drop_rate=drop_rate)).any(0)
    assert torch.equal(found[dropped], base[dropped])


@pytest.mark.parametrize("drop_rate", [0.0, 0.2, 0.999])
def test_dare_keeps_its_share_of_each_parent_independently(drop_rate):
    size, keep = 4_000_003, 1 - drop_rate
    one, other = (mask.double() for mask in masks(size, drop_rate=drop_rate))
    five_errors = 5 * (keep * drop_rate / size) ** 0.5 + 2**-17
    assert abs(one.mean() - keep) < five_errors
    assert abs(other.mean() - keep) < five_errors
    for a, b in ((one, other), (one[1:], one[:-1]), (one[: size // 4], one[-(size // 4) :])):
        assert abs((a * b).mean() - keep**2) < 3 * five_errors


def test_dare_follows_its_seed_alone():
    base, parents = family(2, 100_003, torch.float32)
    once, again = (dare(parents, WEIGHTS, base) for _ in range(2))
    assert torch.equal(once, again)
    for seed in (1, 2**61 + 4, 2**61 + 3 - 2**40):
        assert not torch.equal(once, dare(parents, WEIGHTS, base, seed=seed)), "both halves of a seed count"


def test_a_mask_drawn_on_the_gpu_keeps_its_share():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return drop_mask(torch.Size((1000, 300)), 0.2, generator, torch.device("cuda"))

    assert draw(1).float().mean().item() == pytest.approx(0.8, abs=4e-3)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("merge", [Linear(), Slerp(), Slerp("zero"), Ties(), DareTies(0.0)], ids=repr)
def test_merges_that_draw_nothing_are_the_cpus(merge):
    base, parents = family(2, 10_001, torch.float32)
    generators = [torch.Generator() for _ in parents]
    expected = merge([parent.cpu() for parent in parents], WEIGHTS, base.cpu(), generators)
    torch.testing.assert_close(merge(parents, WEIGHTS, base, generators).cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def pool(tmp_path):
    return make_pool(tmp_path / "pool", 4)


def run(pool, output, num_experts=7, **kwargs):
    return expand(pool.experts, pool.base, num_experts=num_experts, output=output, device="cuda", **kwargs)


def content(found):
    return [flat(expert) for expert in found.experts]


@pytest.mark.parametrize("similarity", [Cosine(), Cosine("zero"), Euclidean()], ids=repr)
def test_an_expansion_without_masks_is_the_cpus(pool, tmp_path, similarity):
    kwargs = {"merge": Linear(), "similarity": similarity, "num_experts": 7}
    found = run(pool, tmp_path / "gpu", **kwargs)
    expected = expand(pool.experts, pool.base, output=tmp_path / "cpu", **kwargs)
    assert [entry.get("parents") for entry in found.lineage] == [entry.get("parents") for entry in expected.lineage]
    torch.testing.assert_close(torch.tensor(found.similarity), torch.tensor(expected.similarity), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(content(found), content(expected))


def test_an_expansion_that_keeps_nothing_on_the_device_is_the_same(pool, tmp_path, monkeypatch):
    kept = run(pool, tmp_path / "kept")
    monkeypatch.setattr(expansion, "residence_on", lambda device, *_, alone: closing(Residence(device, 0)))
    streamed = run(pool, tmp_path / "streamed")
    assert [expert.sha256 for expert in streamed.experts] == [expert.sha256 for expert in kept.experts]
    assert streamed.similarity == kept.similarity


def test_a_finished_expansion_is_taken_as_it_is_but_not_the_cpus(pool, tmp_path):
    expand(pool.experts, pool.base, num_experts=7, output=tmp_path / "out")
    first = run(pool, tmp_path / "out")
    times = [expert.file.stat().st_mtime_ns for expert in first.experts]
    again = run(pool, tmp_path / "out")
    assert [expert.file.stat().st_mtime_ns for expert in again.experts] == times
    assert [expert.sha256 for expert in again.experts] == [expert.sha256 for expert in first.experts]
    fresh = run(pool, tmp_path / "fresh")
    assert [expert.sha256 for expert in fresh.experts] == [expert.sha256 for expert in first.experts]


def test_bfloat16_experts_stay_bfloat16_and_leave_the_device(tmp_path):
    pool, base = Pool(tmp_path / "pool"), random_ffn(0)
    pool.set_base({name: tensor.bfloat16() for name, tensor in base.items()})
    for i in range(2):
        pool.add({name: t.bfloat16() for name, t in near(base, i + 1).items()}, step=i + 1, epoch=0.0, metrics={})
    child = run(pool, tmp_path / "out", 3).experts[-1]
    child.check()
    assert {child.read(name).dtype for name in child.shapes} == {torch.bfloat16}
    assert child.read(next(iter(child.shapes))).device.type == "cpu"


def test_parameters_that_are_not_finite_are_found_on_the_device(pool, tmp_path):
    broken = near(random_ffn(0), 9)
    name = sorted(broken)[-1]
    broken[name][3, 2] = float("inf")
    file = pool.experts[2].file
    content = bytearray(file.read_bytes())
    entry = pool.experts[2].tensors[name]
    content[entry.start : entry.start + broken[name].nbytes] = broken[name].numpy().tobytes()
    file.write_bytes(content)
    with pytest.raises(TensorFileError, match=f"{name!r} holds NaN or infinity"):
        run(pool, tmp_path / "out")


def test_a_gpu_that_is_not_there_is_refused(pool, tmp_path):
    with pytest.raises(ValueError, match="device='cuda:99': there are"):
        expand(pool.experts, pool.base, num_experts=5, output=tmp_path, device="cuda:99")
