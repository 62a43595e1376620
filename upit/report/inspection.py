"""What a run, a pool, a checkpoint or a model on disk holds, as tables for the terminal."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from upit.core.files import read_json
from upit.core.tensor_files import TensorFiles
from upit.expansion.similarity import cosine, inner_products
from upit.model.families import FFN, expert_name
from upit.preparation.expert import Expert
from upit.preparation.pool import Pool
from upit.report.lineage import origin
from upit.report.run import Run
from upit.report.terminal import print_report

Track = Callable[[Iterable], Iterable]


def inspect(path: Path, console: Console, *, track: Track = lambda layers: layers) -> None:
    """Print what is at a path.

    Args:
        path: a run's folder, a pool, a training checkpoint, or a model directory, dense or MoE.
        track: wraps the layers of a MoE, for a progress bar.
    Raises: ValueError: it is none of them.
    """
    if (path / "manifest.json").exists():
        _print_pool(Pool.load(path), console)
    elif (path / "config.json").exists():
        _print_model(path, console, track)
    elif (path / "experts").exists() or (path / "report.json").exists():
        _print_run(Run(path), console)
    elif path.is_file() or (path / "meta.pt").exists():
        _print_checkpoint(path, console)
    else:
        raise ValueError(
            f"{str(path)!r} is no run (experts/, report.json), pool (manifest.json), model (config.json) or checkpoint"
        )


def _print_run(run: Run, console: Console) -> None:
    if (run.directory / "experts" / "manifest.json").exists():
        _print_pool(Pool.load(run.directory / "experts"), console)
    if run.similarity:
        _print_matrix("Similarity of the MoE's experts", run.similarity, console)
    if run.report:
        print_report(run.report, run.lineage, run.directory, console)
    if run.lineage and not (run.report and run.report["seed_counts"]):  # not yet at the swap
        rows = [[entry["expert"], origin(entry)] for entry in run.lineage]
        _print_rows("Experts", ["expert", "origin"], rows, console)


def _print_pool(pool: Pool, console: Console) -> None:
    experts = [pool.base, *pool.experts]
    rows = [
        [label, origin(expert.origin), expert.file.name, expert.dtype, _size(expert), expert.sha256[:12]]
        for label, expert in zip(["base", *range(len(experts) - 1)], experts, strict=True)
    ]
    _print_rows(f"Pool {pool.directory}", ["expert", "origin", "file", "dtype", "size", "sha256"], rows, console)
    if pool.pruned:
        steps = ", ".join(map(str, pool.pruned))
        console.print(f"Pruned after the swap: the experts harvested at steps {steps}", soft_wrap=True)
    similarity = pool.directory / "similarity.json"
    if similarity.exists():
        _print_matrix("Similarity", read_json(similarity, list), console)


def _size(expert: Expert) -> str:
    return f"{expert.file.stat().st_size / 1e6:,.1f} MB" if expert.file.exists() else "missing"


def _print_checkpoint(path: Path, console: Console) -> None:
    from upit.model.loading.identity import read_identity

    identity = read_identity(path)
    config, _ = identity.pop("config"), identity.pop("settings", None)
    rows = [["architecture", config["model_type"]], *([key, value] for key, value in identity.items())]
    _print_rows(f"Checkpoint {path}", ["", ""], rows, console)


def _print_model(path: Path, console: Console, track: Track) -> None:
    from transformers import AutoConfig

    from upit.model.families import MOE_TYPES
    from upit.preparation.moe_files import MoEFiles

    config, files = AutoConfig.from_pretrained(path, trust_remote_code=False), TensorFiles(path)
    total = sum(math.prod(entry.shape) for entry in files.values())
    rows = [["architecture", config.model_type], ["layers", config.num_hidden_layers], ["hidden", config.hidden_size]]
    rows.append(["parameters", f"{total:,}"])
    moe = MoEFiles(path) if config.model_type in MOE_TYPES else None
    if moe:
        experts = [moe.expert(e) for e in range(moe.num_experts)]
        one = sum(math.prod(shape) for shape in experts[0].shapes.values())
        active = total - one * (moe.num_experts - config.num_experts_per_tok)
        rows += [["experts", f"{moe.num_experts}, top-{config.num_experts_per_tok}"], ["of a token", f"{active:,}"]]
    rows.append(["dtype", ", ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in files.values()}))])
    _print_rows(f"Model {path}", ["", ""], rows, console)
    if moe:
        stats = [layer_stats(moe.router(layer), experts, layer) for layer in track(range(moe.num_layers))]
        head = ["layer", *stats[0]]
        _print_rows("Routers and experts", head, [[i, *row.values()] for i, row in enumerate(stats)], console)


def layer_stats(router_EH: Tensor, experts: Sequence[Expert], layer: int) -> dict[str, Any]:
    """How far a layer's routers and experts differ: norms of the gate's rows, and cosines over all pairs.

    Reads one tensor of all experts at a time. Identical experts have a cosine of 1.
    """
    norms_E = router_EH.float().norm(dim=-1)
    pairs = torch.triu_indices(len(experts), len(experts), offset=1).unbind()
    gates = cosine(router_EH.double() @ router_EH.double().T)[pairs]
    products = inner_products(experts, [expert_name(layer, part) for part in FFN], new=len(experts))
    stats: dict[str, Any] = {"gate norm": f"{norms_E.mean():.3f} ({norms_E.min():.3f} to {norms_E.max():.3f})"}
    for name, values in (("gate cosine", gates), ("expert cosine", cosine(products)[pairs])):
        stats[name] = (
            f"{values.mean():.4f} ({values.min():.4f} to {values.max():.4f})" if len(values) else "one expert"
        )
    return stats


def _print_rows(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]], console: Console) -> None:
    console.print(title, soft_wrap=True, highlight=False)
    table = Table(show_header=any(head))
    for name in head:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def _print_matrix(title: str, matrix: Sequence[Sequence[float]], console: Console) -> None:
    rows = [[i, *(f"{value:.2f}" for value in row)] for i, row in enumerate(matrix)]
    _print_rows(title, ["", *map(str, range(len(matrix)))], rows, console)
