"""Dry calls of the choices before any work: with small random tensors, and the checks of the real calls.

Nothing here is a collective, and the random generators of the process are left as they were. Each rank does it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from upit.core.choice import Strategy
from upit.core.files import seeded
from upit.core.gpu import CPU
from upit.expansion.merging import Merge
from upit.expansion.selection import Parents, Selection
from upit.expansion.similarity import Similarity
from upit.preparation.checks import (
    checked_assignment,
    checked_child,
    checked_pair,
    checked_products,
    checked_rows,
    checked_selection,
    checked_similarity,
)
from upit.preparation.expert import Expert
from upit.router_init.base import RouterInit, WithoutData
from upit.router_init.seeds import Assignment

if TYPE_CHECKING:
    from upit.upcycling.growth import NewRows

LARGEST = 256  # of a dimension of the tensors; ours


@contextmanager
def dry_call(choice: Strategy, device: torch.device = CPU) -> Iterator[None]:
    """Leave torch's global generators as they were; an error says that it comes from a dry call."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        except Exception as error:
            error.add_note(f"in a dry call of {choice.class_path} with small random values, before any work")
            raise


def rehearse_expansion(
    *,
    merge: Merge,
    parents: Parents,
    similarity: Similarity,
    selection: Selection,
    metrics: Sequence[Collection[str]],
    available: int,
    num_experts: int,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> None:
    """Call what an expansion from ``available`` to ``num_experts`` experts will call.

    Args:
        metrics: for each expert, the names of the metrics that it comes with.
        shapes: of an expert's tensors; those of its first layer are tried, cut to ``LARGEST`` rows and columns.
        dtype: of the experts.
        device: where experts will be merged.
    Raises: ValueError: a choice returns something else than it should; names its class.
    """
    choices = {"merge": merge, "parents": parents, "similarity": similarity, "selection": selection}
    for field, choice in choices.items():
        choice.check_description(field)
    small = {name: tuple(min(size, LARGEST) for size in shapes[name]) for name in list(shapes)[:3]}
    _rehearse_similarity(similarity, small, dtype)
    matrix = similarity_like(available)
    if num_experts < available:
        with dry_call(selection):
            checked_selection(selection, selection.choose(matrix, num_experts), available, num_experts)
    elif num_experts > available:
        for name, shape in small.items():
            _rehearse_merge(merge, name, shape, dtype, device)
        _rehearse_parents(parents, matrix, metrics)


def similarity_like(num_experts: int) -> Tensor:
    """A random symmetric matrix with ones in the diagonal."""
    drawn = torch.rand((num_experts, num_experts), generator=seeded("rehearsal"), dtype=torch.float64)
    return ((drawn + drawn.T) / 2).fill_diagonal_(1.0)


def _rehearse_merge(merge: Merge, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    draw = seeded("rehearsal", name)
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float32).to(device, dtype) for _ in range(3)]
    kept = [tensor.clone() for tensor in tensors]

    def merged() -> Tensor:
        generators = [seeded("rehearsal", parent) for parent in range(2)]
        child = merge(tensors[:2], [0.25, 0.75], tensors[2], generators)
        return checked_child(merge, child, name, (dtype, shape), tensors[0].device).clone()

    with dry_call(merge, device):
        one, other = merged(), merged()
        if not all(torch.equal(tensor, before) for tensor, before in zip(tensors, kept, strict=True)):
            raise ValueError(f"{merge.class_path} changed a tensor that it was given: work on a copy")
        if not one.isfinite().all():
            raise ValueError(f"{merge.class_path} made NaN or infinity of finite tensors")
        if not torch.equal(one, other):
            raise ValueError(
                f"{merge.class_path} made two children of the same parents and seed: draw from the generators only"
            )


def _rehearse_similarity(similarity: Similarity, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    with TemporaryDirectory() as folder, dry_call(similarity):
        experts = [_small_expert(Path(folder), i, shapes, dtype) for i in range(4)]
        base, pool = experts[0], experts[1:]
        score = {"score": lambda expert: torch.rand(5, generator=seeded(expert.sha256), dtype=torch.float64)}
        options: dict[str, Any] = score if similarity.needs_losses else {}
        products = checked_products(similarity, similarity.products(pool, 3, base, **options), (3, 3))
        checked_similarity(similarity, similarity.matrix(products), 3)
        checked_products(similarity, similarity.products(pool, 1, base, **options), (1, 3))


def _small_expert(folder: Path, i: int, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Expert:
    draw, file = seeded("rehearsal", i), folder / f"{i}.safetensors"
    save_file({name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}, file)
    return Expert(file, str(i), str(dtype).removeprefix("torch."))


def _rehearse_parents(parents: Parents, matrix: Tensor, metrics: Sequence[Collection[str]]) -> None:
    named = [*metrics, *[()] * (len(matrix) - len(metrics))]
    experts = [
        Expert(Path("none"), str(i), "float32", metrics=dict.fromkeys(names, 1.0 + i)) for i, names in enumerate(named)
    ]
    with dry_call(parents):
        pair = parents.choose(matrix, experts, used=set(), generator=seeded("rehearsal"))
        checked_pair(parents, pair, len(experts))


def rehearse_assignment(assignment: Assignment, num_experts: int) -> None:
    """Assign seed examples of random perplexities to experts.

    Raises: ValueError: the result is not an expert for every example; names the class.
    """
    num_seeds = 4 * num_experts
    perplexity_SN = 1 + torch.rand((num_seeds, num_experts), generator=seeded("rehearsal"), dtype=torch.float64)
    with dry_call(assignment):
        checked_assignment(assignment, assignment(perplexity_SN, seeded("rehearsal")), num_seeds, num_experts)


def rehearse_rows(rows: NewRows, moe_config: Any, before: int, after: int) -> None:
    """Make the rows of the experts that join a MoE, from random rows of those it has.

    Raises: ValueError: the result has another shape, or is not finite; names the class.
    """
    layers, hidden = moe_config.num_hidden_layers, moe_config.hidden_size
    router_DNH = torch.randn((layers, before, hidden), generator=seeded("rehearsal"), dtype=torch.float32)
    trained = [{"expert": e, "kind": "harvested", "step": 1, "epoch": 1.0} for e in range(before)]
    merged = {"kind": "merged", "parents": [0, 1], "alpha": 0.25, "beta": 0.75}
    lineage = [*trained, *({"expert": e, **merged} for e in range(before, after))]
    with dry_call(rows):
        checked_rows(rows, rows(router_DNH, lineage, moe_config, seed=0), (layers, after - before, hidden))


def rehearse_router(router: RouterInit, dense_config: Any, num_experts: int) -> None:
    """Make the router, where it needs no data.

    Raises: ValueError: the result has another shape, or is not finite; names the class.
    """
    if isinstance(router, WithoutData):
        with dry_call(router):
            shape = (dense_config.num_hidden_layers, num_experts, dense_config.hidden_size)
            checked_rows(router, router.weights(dense_config, num_experts, seed=0), shape)
