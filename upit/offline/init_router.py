"""``upit init-router``: the router on files, without a trainer. Imports nothing heavy until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from upit.offline.terminal import bar

if TYPE_CHECKING:
    from upit.core.batches import TrainingData
    from upit.router_init import RouterInit
    from upit.router_init.seeds import Assignment


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

    from upit.core.files import Estimate, check_output, fresh_directory
    from upit.core.tensor_files import write_tensors
    from upit.offline.inputs import all_experts, base_at, check_apart, check_experts
    from upit.offline.standalone import dense_model, initialise, learning_estimate, work_beside
    from upit.preparation.compatibility import architecture, check_config
    from upit.preparation.moe_files import MoEFiles
    from upit.router_init import RoutingVectors

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
        track=bar,
    )
    if files:
        files.write_with(
            found, router_DEH, target, overwrite=overwrite, track=lambda names: bar(names, "Writing the MoE")
        )
    else:
        with fresh_directory(target, overwrite=overwrite) as directory:
            specs = {"router": (router_DEH.dtype, tuple(router_DEH.shape))}
            metadata = {"architecture": json.dumps(architecture(config))}
            write_tensors(directory / "router.safetensors", [("router", router_DEH)], specs, metadata)
    print(f"Wrote {output}")
