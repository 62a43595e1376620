"""Expansion on a GPU at the shape of Sheared-LLaMA 2.7B's experts, random weights in bfloat16.

    python -m benchmarks.device_expansion --folder /dev/shm/expansion

First the kernels alone, on tensors that are there already: gigabytes a second, every expert, base and child counted
once, beside a plain copy on the same card (read and written counted) and plain torch. Then a whole ``expand`` from 8
files to 16, by ``--device``. ``--layers`` makes it smaller: 32 layers take 31 GB of files and write 27.
"""

import argparse
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from upit.core.prefetch import ahead
from upit.core.tensor_files import write_tensors
from upit.expansion.expand import expand
from upit.expansion.merging import dare_linear, drop_mask
from upit.expansion.similarity import Cosine
from upit.model.families import FFN, expert_name
from upit.preparation.expert import Expert

HIDDEN, INTERMEDIATE = 2560, 6912
ROUNDS, TENSORS = 10, 12
WEIGHTS = [0.3, 0.7]


def seconds_on_device(work: Callable[[], object]) -> float:
    """Median of several rounds, by the device's own clock."""
    times = []
    for _ in range(ROUNDS + 2):  # two to compile and to warm up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times[2:])


def plain_products(tensors: Sequence[Tensor], base: Tensor, new: int) -> Tensor:
    deltas_MP = torch.stack([tensor.float() - base.float() for tensor in tensors])
    return deltas_MP[-new:] @ deltas_MP.T


def plain_dare(parents: Sequence[Tensor], base: Tensor) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    masks = [drop_mask(base.shape, 0.2, generator, base.device) for generator in generators]
    return dare_linear(parents, WEIGHTS, base, drop_rate=0.2, masks=masks)


def kernels(experts: int) -> None:
    """The kernels beside a copy and plain torch."""
    from upit.expansion.kernels import dare, products

    make = {"device": "cuda", "dtype": torch.bfloat16}
    bases = [torch.randn(HIDDEN * INTERMEDIATE, **make).mul_(0.02) for _ in range(TENSORS)]
    pools = [[base + 1e-3 * torch.randn_like(base) for _ in range(experts)] for base in bases]
    size = TENSORS * bases[0].nbytes
    source, target = (torch.empty(TENSORS * bases[0].numel(), **make) for _ in range(2))
    copied = 2 * size / seconds_on_device(lambda: target.copy_(source)) / 1e9
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(f"| | GB/s | of a copy ({copied:.0f} GB/s) |\n|---|---|---|")

    def row(text: str, count: int, work: Callable[[list[Tensor], Tensor], object]) -> None:
        def all_tensors() -> None:
            for pool, base in zip(pools, bases, strict=True):
                work(pool, base)

        rate = count * size / seconds_on_device(all_tensors) / 1e9
        print(f"| {text} | {rate:.0f} | {rate / copied:.2f} |", flush=True)

    for some in (experts // 2, experts):
        row(f"whole matrix of {some}", some + 1, lambda pool, base, m=some: products(pool[:m], base, new=m))
    for some in (experts // 2 + 1, experts):
        row(f"new row of {some}", some + 1, lambda pool, base, m=some: products(pool[:m], base, new=1))
    row("DARE", 4, lambda pool, base: dare(pool[:2], WEIGHTS, base, drop_rate=0.2, seed=1))
    few = experts // 2
    row(f"plain torch: whole matrix of {few}", few + 1, lambda pool, base: plain_products(pool[:few], base, few))
    row(f"plain torch: new row of {experts}", experts + 1, lambda pool, base: plain_products(pool, base, 1))
    row("plain torch: DARE", 4, lambda pool, base: plain_dare(pool[:2], base))
    exact = products(pools[0], bases[0], new=experts)
    deltas_MP = torch.stack([expert.double() - bases[0].double() for expert in pools[0]])
    error = (Cosine().matrix(exact.cpu()) - Cosine().matrix((deltas_MP @ deltas_MP.T).cpu())).abs().max()
    print(f"\nlargest error of a cosine: {float(error):.1e}")


def random_experts(folder: Path, count: int, layers: int, device: str) -> list[Expert]:
    """Files of a base and experts near it."""
    shapes = {
        expert_name(layer, part): (HIDDEN, INTERMEDIATE) if part == "down_proj" else (INTERMEDIATE, HIDDEN)
        for layer in range(layers)
        for part in FFN
    }
    specs = {name: (torch.bfloat16, shape) for name, shape in sorted(shapes.items())}

    def tensors(e: int) -> Iterator[tuple[str, Tensor]]:
        for t, (name, (dtype, shape)) in enumerate(specs.items()):
            base = torch.randn(shape, generator=torch.Generator(device).manual_seed(t), device=device).mul_(0.02)
            own = torch.Generator(device).manual_seed(len(specs) * e + t)
            delta = torch.randn(shape, generator=own, device=device).mul_(1e-3) if e else 0.0
            yield name, (base + delta).to(dtype).cpu()

    def write(e: int) -> Expert:
        path = folder / f"expert_{e:02d}.safetensors"
        write_tensors(path, tensors(e), specs)
        return Expert(path, f"expert {e}", "bfloat16")

    return list(ahead(write, range(count), workers=4))


def whole(folder: Path, experts: int, layers: int, device: str) -> None:
    """Seconds of an expansion to twice as many experts."""
    shutil.rmtree(folder, ignore_errors=True)
    base, *pool = random_experts(folder / "pool", experts + 1, layers, device)
    if device != "cpu":
        torch.cuda.empty_cache()
    seconds: dict[str, float] = defaultdict(float)

    def track(names: Sequence[str], what: str = "") -> Iterator[str]:
        key = what if seconds else "reading (similarity)"
        key = "merging" if "merge" in key else key
        start = time.perf_counter()
        yield from names
        seconds[key] += time.perf_counter() - start

    start = time.perf_counter()
    expand(pool, base, num_experts=2 * experts, output=folder / "out", track=track, device=device)
    print(f"\nexpand {experts} -> {2 * experts}, {layers} layers, {device}: {time.perf_counter() - start:.1f} s")
    for key, spent in seconds.items():
        print(f"  {key}: {spent:.1f} s")
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks/device_expansion"))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.device != "cpu":
        kernels(2 * options.experts)
        torch.cuda.empty_cache()
    whole(options.folder, options.experts, options.layers, options.device)


if __name__ == "__main__":
    main()
