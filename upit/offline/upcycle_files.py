"""``upit upcycle``: dense checkpoints into a MoE, without a trainer. Imports nothing heavy until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from upit.offline.terminal import bar, keep_freed_memory

if TYPE_CHECKING:
    from upit.core.batches import TrainingData
    from upit.router_init import RouterInit
    from upit.router_init.seeds import Assignment


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
        router: initialisation of the router; default RandomRouter; it and FromFile need no data.
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

    from upit.core.files import check_output
    from upit.offline.conversion import Conversion
    from upit.offline.inputs import all_experts, check_apart
    from upit.offline.standalone import dense_model, initialise, learning_estimate, work_beside
    from upit.router_init import RandomRouter

    if max_shard_gb <= 0:
        raise ValueError(f"max_shard_gb={max_shard_gb} must be positive")
    target = Path(output)
    check_apart(target, [base, *experts])
    if not overwrite:
        check_output(target)
    conversion = Conversion(
        Path(base), all_experts(experts), top_k=top_k, dtype=getattr(torch, dtype) if dtype else None, untie=untie
    )
    router = router or RandomRouter()
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
        track=bar,
    )
    keep_freed_memory()
    torch.set_num_threads(1)  # one tensor at a time is copied and checked: more threads only wait for one another
    conversion.write(
        router_DEH,
        target,
        max_shard_bytes=int(max_shard_gb * 1e9),
        overwrite=overwrite,
        track=lambda names: bar(names, "Upcycling"),
    )
    print(f"Upcycled to {output}")
