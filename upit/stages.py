"""Each stage on its own, on files, without a trainer: what ``upit expand``, ``upcycle`` and so on do.

The functions' arguments are the keys of the command line and of ``--config``. Nothing heavy is imported until one
runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from upit.examples import TrainingData
    from upit.merging import Merge
    from upit.router_init import RouterInit
    from upit.seed_data import Assignment
    from upit.selection import Parents, Selection
    from upit.similarity import Similarity


def upcycle(
    base: str,
    experts: list[str],
    output: str,
    top_k: int = 2,
    router: RouterInit | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    data: TrainingData | None = None,
    seed_fraction: float = 0.01,
    assignment: Assignment | None = None,
    seed: int = 0,
    max_shard_gb: float = 5.0,
    untie: bool = False,
    overwrite: bool = False,
) -> None:
    """Assemble dense checkpoints into a Mixture-of-Experts that stock transformers loads, tensor by tensor.

    Args:
        base: dense checkpoint directory; gives config, tokenizer and every weight that is no expert's.
        experts: checkpoint directories, one an expert, and pools of harvested or expanded experts, which give all
            theirs; wildcards are expanded.
        output: directory to write.
        top_k: experts a token.
        router: initialisation of the router; default Random; it and FromFile need no data.
        dtype: of the output; default the inputs'.
        data: data module that the router's seed data is drawn from.
        seed_fraction: part of the training set drawn as seed data; 0.01 is the paper's.
        assignment: who gets which seed example; default LowestPerplexity.
        seed: of all that is drawn.
        max_shard_gb: size of a weight file, GB.
        untie: write a head of its own where it is tied to the embedding; some clients need one (docs/clients.md).
        overwrite: replace what is at the output.
    """
    import torch

    from upit.conversion import Conversion
    from upit.files import check_output
    from upit.router_init import Random
    from upit.router_init.standalone import dense_model, initialise, learning_estimate, work_beside
    from upit.stage_inputs import all_experts, check_apart

    if max_shard_gb <= 0:
        raise ValueError(f"max_shard_gb={max_shard_gb} must be positive")
    target = Path(output)
    check_apart(target, [base, *experts])
    if not overwrite:
        check_output(target)
    conversion = Conversion(
        Path(base), all_experts(experts), top_k=top_k, dtype=getattr(torch, dtype) if dtype else None, untie=untie
    )
    router = router or Random()
    estimate = learning_estimate(router, conversion.base, len(conversion.experts)).then(conversion.estimate())
    print(f"{len(conversion.experts)} experts, top-{top_k}: needs {estimate}")
    estimate.check(target)
    conversion.experts, router_DEH = initialise(
        router,
        lambda: dense_model(base),
        conversion.experts,
        conversion.dense,
        data,
        seed_fraction=seed_fraction,
        assignment=assignment,
        seed=seed,
        directory=work_beside(target),
        track=_bar,
    )
    _keep_freed_memory()
    torch.set_num_threads(1)  # one tensor at a time is copied and checked: more threads only wait for one another
    conversion.write(
        router_DEH,
        target,
        max_shard_bytes=int(max_shard_gb * 1e9),
        overwrite=overwrite,
        track=lambda names: _bar(names, "Upcycling"),
    )
    print(f"Upcycled to {output}")


def expand(
    base: str,
    experts: list[str],
    num_experts: int,
    output: str,
    merge: Merge | None = None,
    parents: Parents | None = None,
    similarity: Similarity | None = None,
    selection: Selection | None = None,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
) -> None:
    """Make any number of experts from a few checkpoints (arXiv:2410.01610, Algorithm 2), as a pool.

    The pool holds the experts' parameters alone, a manifest, and their lineage and similarity. Interrupted, the same
    command takes up what is finished.

    Args:
        base: where task vectors start, the model before instruction tuning: a checkpoint directory, or a pool, for
            its base.
        experts: checkpoint directories, one an expert, and pools, which give all theirs; wildcards are expanded.
        num_experts: experts to end with; fewer than there are selects.
        output: directory to write.
        merge: how two parents become one more expert; default Dare.
        parents: which two; default MostDissimilar.
        similarity: how alike two experts are; default Cosine, of their task vectors.
        selection: which ones are left out; default Even.
        seed: of all that is drawn.
        device: cpu, cuda or cuda:N. A GPU keeps what fits into its memory; it draws other masks than the CPU, so the
            merged experts are others too.
        overwrite: replace the pool at the output.
    """
    import shutil

    import torch

    from upit.artefacts import LINEAGE_FILE, write_lineage
    from upit.expansion import check_choices, metrics_of
    from upit.expansion import expand as expand_pool
    from upit.files import write_json
    from upit.merging import Dare
    from upit.pool import Pool
    from upit.rehearsal import rehearse_expansion
    from upit.resident import checked_device
    from upit.selection import Even, MostDissimilar
    from upit.similarity import Cosine
    from upit.stage_inputs import (
        all_experts,
        base_at,
        check_apart,
        check_experts,
        check_similarity,
        expansion_estimate,
    )

    check_similarity(similarity)
    place = checked_device(device, "device")
    pool, found, origin = Pool(Path(output)), all_experts(experts), base_at(base)
    check_apart(pool.directory, [base, *experts])
    check_experts(found, origin)
    check_choices(len(found), num_experts, parents or MostDissimilar(), metrics_of(found))
    rehearse_expansion(
        merge=merge or Dare(),
        parents=parents or MostDissimilar(),
        similarity=similarity or Cosine(),
        selection=selection or Even(),
        metrics=metrics_of(found),
        available=len(found),
        num_experts=num_experts,
        shapes=origin.shapes,
        dtype=next(iter(found[0].specs.values()))[0],
        device=place,
    )
    if pool.manifest_file.exists() and not overwrite:
        raise FileExistsError(f"output={output!r} holds a pool already; name another directory, or add --overwrite")
    if any(file.suffix not in (".safetensors", ".json") for file in pool.directory.glob("*")):
        raise FileExistsError(f"output={output!r} holds more than a pool; name another directory")
    estimate = expansion_estimate(origin, len(found), num_experts)
    print(f"{len(found)} experts to {num_experts}: needs {estimate}")
    estimate.check(pool.directory)
    if overwrite:
        shutil.rmtree(pool.directory, ignore_errors=True)
    # with a thread for every core, each operation waits for the core that something else is using
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    _keep_freed_memory()
    expansion = expand_pool(
        found,
        origin,
        num_experts=num_experts,
        output=pool.directory,
        merge=merge,
        parents=parents,
        selection=selection,
        similarity=similarity,
        seed=seed,
        device=device,
        track=lambda names, what="": _bar(names, f"Expanding {what}"),
    )
    own = pool.gather(origin, expansion.experts, track=lambda numbers: _bar(numbers, "Copying experts"))
    places = [{"file": str(expert.file), "sha256": expert.sha256} for expert in own]
    lineage = [entry | place for entry, place in zip(expansion.lineage, places, strict=True)]
    write_lineage(pool.directory / LINEAGE_FILE, lineage)
    write_json(pool.directory / "similarity.json", expansion.similarity)
    print(f"{num_experts} experts in {output}")


def init_router(
    base: str,
    output: str,
    moe: str | None = None,
    experts: list[str] | None = None,
    router: RouterInit | None = None,
    data: TrainingData | None = None,
    seed_fraction: float = 0.01,
    assignment: Assignment | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Initialise the router of a MoE, or of experts that are to become one.

    Of a MoE, writes it again with the new router. Of experts, writes ``router.safetensors``, which upcycle takes by
    ``--router FromFile --router.path FILE``; experts that were trained along lie in ``<output>.router``.

    Args:
        base: dense checkpoint directory: the architecture, and beside experts every other weight.
        output: directory to write.
        moe: MoE directory; give this or experts.
        experts: checkpoint directories, one an expert, and pools, which give all theirs; wildcards are expanded.
        router: initialisation of the router; default RoutingVectors.
        data: data module that the seed data is drawn from.
        seed_fraction: part of the training set drawn as seed data; 0.01 is the paper's.
        assignment: who gets which seed example; default LowestPerplexity.
        seed: of all that is drawn.
        overwrite: replace what is at the output.
    """
    import json

    from transformers import AutoConfig

    from upit.compatibility import architecture, check_config
    from upit.files import Estimate, check_output, fresh_directory
    from upit.moe_files import MoEFiles
    from upit.router_init import RoutingVectors
    from upit.router_init.standalone import dense_model, initialise, learning_estimate, work_beside
    from upit.stage_inputs import all_experts, base_at, check_apart, check_experts
    from upit.tensor_files import write_tensors

    if (moe is None) == (experts is None):
        raise ValueError(f"give one of moe and experts: got moe={moe!r}, experts={experts!r}")
    target = Path(output)
    check_apart(target, [base, *(experts or [str(moe)])])
    if not overwrite:
        check_output(target)
    files = MoEFiles(Path(moe)) if moe else None
    found = [files.expert(e) for e in range(files.num_experts)] if files else all_experts(experts or [])
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    dense, router = base_at(base), router or RoutingVectors()
    check_experts(found, dense)
    if files:
        check_config(files.directory, files.config, config, moe=True)
    size = 4 * config.num_hidden_layers * len(found) * config.hidden_size
    estimate = learning_estimate(router, dense.tensors, len(found)).then(
        files.estimate() if files else Estimate(size, size)
    )
    print(f"Router of {len(found)} experts: needs {estimate}")
    estimate.check(target)
    found, router_DEH = initialise(
        router,
        lambda: dense_model(base, moe),
        found,
        config,
        data,
        seed_fraction=seed_fraction,
        assignment=assignment,
        seed=seed,
        directory=work_beside(target),
        track=_bar,
    )
    if files:
        files.write_with(
            found, router_DEH, target, overwrite=overwrite, track=lambda names: _bar(names, "Writing the MoE")
        )
    else:
        with fresh_directory(target, overwrite=overwrite) as directory:
            specs = {"router": (router_DEH.dtype, tuple(router_DEH.shape))}
            metadata = {"architecture": json.dumps(architecture(config))}
            write_tensors(directory / "router.safetensors", [("router", router_DEH)], specs, metadata)
    print(f"Wrote {output}")


def inspect(path: str) -> None:
    """Show what a run, a pool, a training checkpoint or a model directory holds.

    Pools: experts, their origins and similarity. Runs: these, and lineage, seed examples and scores. Checkpoints:
    phase, step and architecture. Models: sizes, and of a MoE how far its gates' rows and its experts differ in each
    layer.

    Args:
        path: run's folder, pool, checkpoint, or model directory.
    """
    from rich.console import Console

    from upit.inspection import inspect as show

    show(Path(path), Console(), track=lambda layers: _bar(layers, "Comparing experts"))


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: a tensor's memory anew from the kernel costs several times the work on it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((-1, 2**31 - 1), (-3, 1 << 25), (-8, 1)):  # trim and mmap thresholds, number of arenas
            mallopt(option, value)


def _bar(items: Iterable, text: str) -> Iterable:
    from tqdm.auto import tqdm

    return tqdm(items, text, leave=False)
