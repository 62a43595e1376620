"""Experts on disk for tests: small random ones."""

from pathlib import Path

import torch

from upit.model.families import FFN, expert_name
from upit.preparation.expert import Expert
from upit.preparation.pool import Pool

HIDDEN, INTERMEDIATE, LAYERS = 16, 24, 2


def random_ffn(seed: int, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for projection in FFN:
            shape = (HIDDEN, INTERMEDIATE) if projection == "down_proj" else (INTERMEDIATE, HIDDEN)
            tensors[expert_name(layer, projection)] = scale * torch.randn(shape, generator=generator)
    return tensors


def near(base: dict[str, torch.Tensor], seed: int, scale: float = 0.1) -> dict[str, torch.Tensor]:
    return {name: base[name] + delta for name, delta in random_ffn(seed, scale=scale).items()}


def make_pool(directory: Path, num_experts: int, **metrics: list[float]) -> Pool:
    """A pool of experts in different directions from one base."""
    pool, base = Pool(directory), random_ffn(0)
    pool.set_base(base)
    for i in range(num_experts):
        noted = {name: values[i] for name, values in metrics.items()}
        pool.add(near(base, i + 1), step=i + 1, epoch=(i + 1) / 4, metrics=noted)
    return pool


def flat(expert: Expert) -> torch.Tensor:
    return torch.cat([expert.read(name).flatten() for name in expert.shapes])
