"""Expert expansion: any number of experts from M checkpoints (arXiv:2410.01610, Algorithm 2)."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upit.core.distributed import on_rank_zero, rank
from upit.core.files import digest, seeded
from upit.core.prefetch import ahead
from upit.core.progress import Track, untracked
from upit.core.tensor_files import NotFiniteTensorError, Specs
from upit.expansion.device_cache import checked_device, residence_on
from upit.expansion.merging import Dare, Merge
from upit.expansion.selection import Even, MostDissimilar, Parents, Selection
from upit.expansion.similarity import Cosine, Score, Similarity
from upit.preparation.checks import (
    checked_child,
    checked_pair,
    checked_products,
    checked_selection,
    checked_similarity,
)
from upit.preparation.expert import Expert
from upit.preparation.pool import write_once


@dataclass
class Expansion:
    """N experts, where each comes from, and how similar they are."""

    experts: list[Expert]
    lineage: list[dict[str, Any]]
    similarity: list[list[float]]


def expand(
    pool: Sequence[Expert],
    base: Expert,
    *,
    num_experts: int,
    output: Path,
    merge: Merge | None = None,
    parents: Parents | None = None,
    selection: Selection | None = None,
    similarity: Similarity | None = None,
    seed: int = 0,
    score: Score | None = None,
    track: Track = untracked,
    device: str = "cpu",
) -> Expansion:
    """N experts from a pool of M; a collective, of which rank 0 does all but the scoring.

    N > M: rounds of selection (``parents`` of the growing pool), crossover (alpha ~ U(0, 1), beta = 1 - alpha) and
    mutation (``merge``). N < M: ``selection``. Seeded per round and tensor, so the result depends on no order of work.
    A merged expert already in ``output`` that matches in all it depends on is taken as it is.

    Args:
        pool: M experts, by step where they have one.
        base: origin of the task vectors (ours: the model before instruction tuning).
        num_experts: N.
        output: directory for ``merged_NN.safetensors``.
        merge, parents, selection, similarity: default ``Dare()``, ``MostDissimilar()``, ``Even()``, ``Cosine()``.
        score: losses of an expert on seed examples, for a similarity that compares them.
        track: wraps the tensor names of each pass, for a progress bar.
        device: "cpu", "cuda" or "cuda:N". A GPU keeps the experts that fit into its free memory, and reads the others
            from their files each time. It draws masks of its own, so its children are others than the CPU's.
    Raises: ValueError: N < 1, fewer than two experts to merge, parents that can't be chosen, no such device, or a
        strategy returned something else than it should; names its class.
    """
    how = _Choices(
        merge or Dare(), parents or MostDissimilar(), similarity or Cosine(), selection or Even(), seed, score, track
    )
    check_choices(len(pool), num_experts, how.parents, metrics_of(pool))
    for field in ("merge", "parents", "similarity", "selection"):
        getattr(how, field).check_description(field)
    place = checked_device(device, "device"), base.shapes, max(num_experts, len(pool))
    with residence_on(*place, alone=not how.similarity.needs_losses) as residence:
        *experts, base = [replace(expert, residence=residence) for expert in (*pool, base)]
        experts, products = _chosen(experts, base, num_experts, how)
        first = len(experts)
        try:
            experts, products = _bred(experts, products, base, num_experts, output, how)
        except NotFiniteTensorError as error:
            raise ValueError(f"{how.merge.class_path}: a merged expert is not finite: {error}") from None
    lineage = [_entry(i, expert, how.similarity) for i, expert in enumerate(experts)]
    for entry in lineage[first:]:
        entry["drop_rate"] = getattr(how.merge, "drop_rate", None)
    return Expansion(experts, lineage, _matrix(products, how).tolist())


@dataclass(frozen=True)
class _Choices:
    """What :func:`expand` is told, for its parts."""

    merge: Merge
    parents: Parents
    similarity: Similarity
    selection: Selection
    seed: int
    score: Score | None
    track: Track


def _chosen(experts: list[Expert], base: Expert, most: int, how: _Choices) -> tuple[list[Expert], Tensor]:
    """At most so many of the experts, and their inner products."""
    products = _products(experts, len(experts), base, how)
    if most >= len(experts):
        return experts, products
    chosen = how.selection.choose(_matrix(products, how), most)
    chosen = checked_selection(how.selection, chosen, len(experts), most)
    return [experts[i] for i in chosen], products[chosen][:, chosen]


def _bred(
    experts: list[Expert], products: Tensor, base: Expert, num_experts: int, output: Path, how: _Choices
) -> tuple[list[Expert], Tensor]:
    """The experts with the children that make them N, all on disk, and the inner products of all."""
    used: set[tuple[int, int]] = set()
    specs = [expert.specs for expert in experts]  # a child's file may still be being written
    for number in range(num_experts - len(experts)):
        matrix = _matrix(products, how)
        pair = how.parents.choose(matrix, experts, used=used, generator=seeded(how.seed, number, "parents"))
        j, k = checked_pair(how.parents, pair, len(experts))
        used.add((min(j, k), max(j, k)))
        birth = _birth(number, (j, k), float(matrix[j, k]), base, how)
        child = _child([experts[j], experts[k]], base, birth, output, specs[j], how)
        experts = [*experts, *(_written([child], how.track) if how.similarity.needs_losses else [child])]
        specs.append(specs[j])
        row = _products(experts, 1, base, how)
        products = torch.cat([torch.cat([products, row[:, :-1].T], dim=1), row])
    return [replace(expert, residence=None) for expert in _written(experts, how.track)], products


def check_choices(available: int, num_experts: int, parents: Parents, metrics: Sequence[Collection[str]]) -> None:
    """Refuse, before any work, what could not give N experts.

    Args:
        available: M.
        metrics: for each expert, the names of those that it comes with.
    Raises: ValueError: N < 1; or N > M and fewer than two experts to merge, or parents that can't be chosen.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    if num_experts > available:
        if available < 2:
            raise ValueError(
                f"num_experts={num_experts} needs at least 2 checkpoints to merge, there are {available}; "
                "harvest more often"
            )
        parents.check(metrics)


def metrics_of(experts: Iterable[Expert]) -> list[set[str]]:
    """For each expert, the names of the metrics that it comes with and that are numbers."""
    return [{name for name, value in expert.metrics.items() if math.isfinite(value)} for expert in experts]


def _products(experts: Sequence[Expert], new: int, base: Expert, how: _Choices) -> Tensor:
    """Inner products; only a similarity that scores needs every rank."""
    if how.similarity.needs_losses:
        products = how.similarity.products(experts, new, base, score=how.score, track=how.track)
    else:
        products = on_rank_zero(lambda: how.similarity.products(experts, new, base, track=how.track))
    return checked_products(how.similarity, products, (new, len(experts)))


def _matrix(products: Tensor, how: _Choices) -> Tensor:
    return checked_similarity(how.similarity, how.similarity.matrix(products), len(products))


def _entry(i: int, expert: Expert, similarity: Similarity) -> dict[str, Any]:
    file = {"file": str(expert.file), "sha256": expert.sha256}
    return {"expert": i, **expert.origin, **file, "measure": similarity.describe()}


def _birth(number: int, pair: tuple[int, int], similarity: float, base: Expert, how: _Choices) -> dict[str, Any]:
    alpha = float(torch.rand((), generator=seeded(how.seed, number, "alpha"), dtype=torch.float64))
    return {
        "kind": "merged",
        "round": number,
        "parents": list(pair),
        "alpha": alpha,
        "beta": 1.0 - alpha,
        "seed": how.seed,
        "similarity": similarity,
        "merge": how.merge.describe(),
        "chosen_by": [how.parents.describe(), how.similarity.describe()],
        "device": base.device.type,
    }


def _child(
    parents: Sequence[Expert], base: Expert, birth: dict[str, Any], output: Path, specs: Specs, how: _Choices
) -> Expert:
    """Make the child of two experts. One that is still being written has its fingerprint for a sha256."""
    number, seed, residence = birth["round"], birth["seed"], base.residence
    weights = [birth["alpha"], birth["beta"]]
    ancestors = [base.sha256, *(parent.sha256 for parent in parents)]
    device = [residence.device.type] if residence else []  # which draws masks, and rounds, in its own way
    fingerprint = digest([ancestors, weights, how.merge.key(), seed, number, *device])

    def child(name: str) -> tuple[str, Tensor]:
        generators = [seeded(seed, number, parent, name) for parent in range(len(parents))]
        merged = how.merge([parent.read(name) for parent in parents], weights, base.read(name), generators)
        return name, checked_child(how.merge, merged, name, specs[name], base.device)

    file = output / f"merged_{number:02d}.safetensors"
    content = file, ahead(child, how.track(base.shapes, f"(merge {number + 1})")), specs, fingerprint
    if residence is None:
        sha256 = on_rank_zero(lambda: write_once(*content))
    else:
        sha256 = fingerprint
        if rank() == 0:
            residence.write_once(*content)
    return Expert(file, sha256, parents[0].dtype, origin=birth, residence=residence)


def _written(experts: Sequence[Expert], track: Track) -> list[Expert]:
    """The experts with their files' sha256, once they are written."""
    residence = experts[0].residence
    if residence is None:
        return list(experts)
    found = on_rank_zero(lambda: residence.written(track))
    return [replace(expert, sha256=found.get(expert.file, expert.sha256)) for expert in experts]
