"""Expert expansion: any number of experts from M checkpoints (arXiv:2410.01610, Algorithm 2)."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from upit.merging import dare_linear, drop_mask, task_vector
from upit.pool import Expert, file_sha256, write_expert

Policy = Literal["even", "last", "most_diverse"]
Track = Callable[..., Iterable]


@dataclass
class Expansion:
    """N experts, where each comes from, and how similar their task vectors are."""

    experts: list[Expert]
    lineage: list[dict[str, Any]]
    similarity: list[list[float]]


def gram_matrix(experts: Sequence[Expert], base: Expert, *, track: Track = lambda names, what="": names) -> Tensor:
    """Inner products of the experts' task vectors over all their parameters.

    Streams tensor by tensor and reads each expert's parameters once.

    Returns: (M, M) float64.
    """
    gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for name in track(base.shapes, "(similarity)"):
        origin = base.read(name)
        deltas = torch.stack([task_vector(expert.read(name), origin).flatten() for expert in experts])
        gram += (deltas @ deltas.T).double()
    return gram


def cosine(gram: Tensor) -> Tensor:
    """Cosine similarity from inner products; a zero task vector is similar to nothing but itself."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    return (gram / (norms[:, None] * norms[None, :]).clamp(min=1e-30)).fill_diagonal_(1.0)


def most_dissimilar(similarity: Tensor, *, used: set[tuple[int, int]] | frozenset = frozenset()) -> tuple[int, int]:
    """The pair with the lowest similarity that is not in ``used`` (all pairs, once all are used), j < k."""
    pairs = [(j, k) for k in range(len(similarity)) for j in range(k)]
    free = [pair for pair in pairs if pair not in used] or pairs
    return min(free, key=lambda pair: (float(similarity[pair]), pair))


def select(similarity: Tensor, num_experts: int, policy: Policy) -> list[int]:
    """Which of M checkpoints become experts when N < M (the paper leaves it open).

    ``even``: evenly spaced, the last included. ``last``: the last N. ``most_diverse``: the last, then each time the
    one whose highest similarity to those chosen is lowest.
    """
    count = len(similarity)
    if policy == "last":
        return list(range(count - num_experts, count))
    if policy == "even":
        return [round((i + 1) * count / num_experts) - 1 for i in range(num_experts)]
    chosen = [count - 1]
    while len(chosen) < num_experts:
        rest = [i for i in range(count) if i not in chosen]
        chosen.append(min(rest, key=lambda i: float(similarity[i, chosen].max())))
    return sorted(chosen)


def expand(
    pool: Sequence[Expert],
    base: Expert,
    *,
    num_experts: int,
    output: Path,
    drop_rate: float = 0.2,
    seed: int = 0,
    policy: Policy = "even",
    track: Track = lambda names, what="": names,
) -> Expansion:
    """N experts from the harvested pool.

    N > M: rounds of selection (the two most dissimilar of the growing pool), crossover (alpha ~ U(0, 1),
    beta = 1 - alpha) and mutation (DARE). A pair has one child (ours: else the same pair would be chosen for ever).
    N < M: ``policy``. Seeded per round and tensor, so the result depends on no order of work. A merged expert already
    in ``output`` that matches in all it depends on is taken as it is.

    Args:
        pool: M harvested experts by step.
        base: origin of the task vectors (ours: the model before instruction tuning).
        num_experts: N.
        output: directory for ``merged_NN.safetensors``.
        drop_rate: DARE's p; 0.2 is ours.
        track: wraps the tensor names of each merge, for a progress bar.
    Raises: ValueError: N < 1, drop_rate outside [0, 1), or fewer than two checkpoints to merge.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    if not 0.0 <= drop_rate < 1.0:
        raise ValueError(f"drop_rate={drop_rate} must lie in [0, 1)")
    if num_experts > len(pool) and len(pool) < 2:
        raise ValueError(f"num_experts={num_experts} needs at least 2 checkpoints to merge, the pool has {len(pool)}")
    gram = gram_matrix(pool, base, track=track)
    experts = list(pool)
    if num_experts < len(pool):
        chosen = select(cosine(gram), num_experts, policy)
        experts, gram = [experts[i] for i in chosen], gram[chosen][:, chosen]
    lineage = [_harvested(i, expert) for i, expert in enumerate(experts)]
    used: set[tuple[int, int]] = set()
    for number in range(num_experts - len(experts)):
        similarity = cosine(gram)
        j, k = most_dissimilar(similarity, used=used)
        used.add((j, k))
        alpha = float(torch.rand((), generator=_generator(seed, number, "alpha"), dtype=torch.float64))
        birth = {
            "round": number,
            "parents": [j, k],
            "alpha": alpha,
            "beta": 1.0 - alpha,
            "seed": seed,
            "drop_rate": drop_rate,
            "similarity": float(similarity[j, k]),
        }
        child, row = _merge(experts, j, k, base, birth, output / f"merged_{number:02d}.safetensors", track)
        lineage.append({"expert": len(experts), "kind": "merged", **birth, **_where(child)})
        experts.append(child)
        gram = torch.cat([torch.cat([gram, row[:-1, None]], dim=1), row[None]])
    return Expansion(experts, lineage, cosine(gram).tolist())


def _harvested(i: int, expert: Expert) -> dict[str, Any]:
    return {"expert": i, "kind": "harvested", "step": expert.step, "epoch": expert.epoch, **_where(expert)}


def _where(expert: Expert) -> dict[str, str]:
    return {"file": str(expert.file), "sha256": expert.sha256}


def _merge(
    experts: Sequence[Expert], j: int, k: int, base: Expert, birth: dict[str, Any], path: Path, track: Track
) -> tuple[Expert, Tensor]:
    """Write the child of experts j and k; its row of inner products comes along in the same pass."""
    key = {**birth, "similarity": None, "parents": [experts[j].sha256, experts[k].sha256], "base": base.sha256}
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    finished = _finished(path, fingerprint)
    row = torch.zeros(len(experts) + 1, dtype=torch.float64)

    def children() -> Iterable[tuple[str, Tensor]]:
        for name in track(base.shapes, f"(merge {birth['round'] + 1})"):
            origin = base.read(name)
            tensors = [expert.read(name) for expert in experts]
            masks = [
                drop_mask(origin.shape, birth["drop_rate"], _generator(birth["seed"], birth["round"], parent, name))
                for parent in (0, 1)
            ]
            child = dare_linear(
                [tensors[j], tensors[k]],
                [birth["alpha"], birth["beta"]],
                origin,
                drop_rate=birth["drop_rate"],
                masks=masks,
            )
            own = task_vector(child, origin).flatten()
            for i, tensor in enumerate([*tensors, child]):
                row[i] += float(own @ task_vector(tensor, origin).flatten())
            yield name, child

    if finished is None:
        dtype = getattr(torch, experts[j].dtype)
        specs = {name: (dtype, shape) for name, shape in base.shapes.items()}
        sha256 = write_expert(path, children(), specs, {"fingerprint": fingerprint})
    else:
        sha256 = finished
        for _ in children():
            pass
    return Expert(path, sha256, experts[j].dtype), row


def _finished(path: Path, fingerprint: str) -> str | None:
    """sha256 of the merged expert on disk, where it is the one wanted."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return file_sha256(path) if (file.metadata() or {}).get("fingerprint") == fingerprint else None


def _generator(*key: Any) -> torch.Generator:
    """A random generator seeded by a key."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
