"""Each stage on its own, on files, without a trainer: what ``upit upcycle``, ``expand`` and ``init-router`` do.

The functions' arguments are the keys of the command line and of ``--config``. Nothing heavy is imported until one
runs, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from upit.examples import TrainingData
    from upit.pool import Expert
    from upit.router_init import RouterInit
    from upit.seed_data import Assignment


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
    overwrite: bool = False,
) -> None:
    """Assemble dense checkpoints into a Mixture-of-Experts that stock transformers loads, tensor by tensor.

    Args:
        base: dense checkpoint directory; gives config, tokenizer and every weight that is no expert's.
        experts: checkpoint directories, one an expert, and pools of harvested or expanded experts, which give all
            theirs.
        output: directory to write.
        top_k: experts a token.
        router: initialisation of the router; default Random, the only one that needs no data.
        dtype: of the output; default the inputs'.
        data: data module that the router's seed data is drawn from.
        seed_fraction: part of the training set drawn as seed data; 0.01 is the paper's.
        assignment: who gets which seed example; default LowestPerplexity.
        seed: of all that is drawn.
        max_shard_gb: size of a weight file, GB.
        overwrite: replace what is at the output.
    """
    import torch

    from upit.conversion import Conversion

    target = Path(output)
    conversion = Conversion(
        Path(base), _experts_at(experts), top_k=top_k, dtype=getattr(torch, dtype) if dtype else None
    )
    estimate = conversion.estimate()
    print(f"{len(conversion.experts)} experts, top-{top_k}: needs {estimate}")
    conversion.check_room(estimate, target, overwrite=overwrite)
    conversion.experts, router_DEH = _initialise_router(
        router, Path(base), conversion.experts, data, seed_fraction, assignment, seed, target
    )
    torch.set_num_threads(1)  # one tensor at a time is copied and checked: more threads only wait for one another
    conversion.write(
        router_DEH,
        target,
        max_shard_bytes=int(max_shard_gb * 1e9),
        overwrite=overwrite,
        track=lambda names: _bar(names, "Upcycling"),
    )
    print(f"Upcycled to {output}")


def _experts_at(paths: list[str]) -> list[Expert]:
    from upit.expert_sources import directories, experts_at

    return [expert for path in directories(paths, field="experts") for expert in experts_at(path)]


def _initialise_router(
    router: RouterInit | None,
    dense: Path,
    experts: list[Expert],
    data: TrainingData | None,
    seed_fraction: float,
    assignment: Assignment | None,
    seed: int,
    output: Path,
) -> tuple[list[Expert], Tensor]:
    """The experts, which may be trained along, and the routers' weights; keeps its work beside the output."""
    from upit.router_init import Random

    router = router or Random()
    if isinstance(router, Random):
        from transformers import AutoConfig

        return experts, router.weights(AutoConfig.from_pretrained(dense), len(experts), seed=seed)
    if data is None:
        raise ValueError(f"router={router} learns from seed data: set data to a data module")
    from upit.models import load_pretrained
    from upit.scoring import SeedScorer
    from upit.seed_data import LowestPerplexity, draw_seed

    data.prepare_data()
    data.setup("fit")
    model = load_pretrained(str(dense)).eval()
    indices = draw_seed(len(data.train_set), fraction=seed_fraction, seed=seed, minimum=len(experts))
    work = output.with_name(output.name + ".router")
    scorer = SeedScorer(model, indices, data, file=work / "seed_perplexity.json")
    seeds = scorer.assign(
        experts, assignment or LowestPerplexity(), seed=seed, track=lambda items: _bar(items, "Scoring seed data")
    )
    return router(
        model,
        experts,
        seeds,
        data,
        directory=work,
        seed=seed,
        track=lambda items: _bar(items, "Initialising the router"),
    )


def _bar(items: Iterable, text: str) -> Iterable:
    from tqdm.auto import tqdm

    return tqdm(items, text, leave=False)
