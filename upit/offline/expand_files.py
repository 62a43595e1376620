"""``upit expand``: expansion on files, without a trainer. Imports nothing heavy until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from upit.offline.terminal import bar, keep_freed_memory

if TYPE_CHECKING:
    from upit.expansion.merging import Merge
    from upit.expansion.selection import Parents, Selection
    from upit.expansion.similarity import Similarity


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

    from upit.core.files import write_json
    from upit.expansion.device_cache import checked_device
    from upit.expansion.expand import check_choices, metrics_of
    from upit.expansion.expand import expand as expand_pool
    from upit.expansion.merging import Dare
    from upit.expansion.selection import Even, MostDissimilar
    from upit.expansion.similarity import Cosine
    from upit.offline.inputs import (
        all_experts,
        base_at,
        check_apart,
        check_experts,
        check_similarity,
        expansion_estimate,
    )
    from upit.preparation.pool import Pool
    from upit.report.run import LINEAGE_FILE, write_lineage
    from upit.upcycling.rehearsal import rehearse_expansion

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
    keep_freed_memory()
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
        track=lambda names, what="": bar(names, f"Expanding {what}"),
    )
    own = pool.gather(origin, expansion.experts, track=lambda numbers: bar(numbers, "Copying experts"))
    places = [{"file": str(expert.file), "sha256": expert.sha256} for expert in own]
    lineage = [entry | place for entry, place in zip(expansion.lineage, places, strict=True)]
    write_lineage(pool.directory / LINEAGE_FILE, lineage)
    write_json(pool.directory / "similarity.json", expansion.similarity)
    print(f"{num_experts} experts in {output}")
