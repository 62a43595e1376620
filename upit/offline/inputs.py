"""What the stages on files are given: experts and bases by their paths, and what is refused before any work."""

from collections.abc import Mapping
from pathlib import Path

from upit.core.files import Estimate
from upit.core.tensor_files import size_of
from upit.expansion.device_cache import working_memory
from upit.expansion.similarity import Similarity
from upit.model.loading.configs import read_configs
from upit.preparation.compatibility import check_config, check_same_vocabulary, check_shapes, dense_shapes
from upit.preparation.expert import Expert
from upit.preparation.pool import Pool
from upit.preparation.sources import directories, experts_at


def all_experts(paths: list[str]) -> list[Expert]:
    """The experts of checkpoint directories and pools; wildcards are expanded.

    Raises: ValueError: a path matches nothing or is neither, or a file is broken.
    """
    return [expert for path in directories(paths, field="experts") for expert in experts_at(path)]


def base_at(path: str) -> Expert:
    """Where task vectors start: a pool's base, or the checkpoint that is a directory."""
    pool = Pool(Path(path))
    return pool.base if pool.manifest_file.exists() else experts_at(pool.directory)[0]


def check_experts(experts: list[Expert], base: Expert) -> None:
    """Compare experts and their base before any work. The first checkpoint directory is what the others must match.

    Raises: ValueError: a checkpoint is not complete, or an expert's architecture, shapes or vocabulary are not the
        base's.
    """
    directories = [each.file for each in (base, *experts) if each.file.is_dir() and not each.names]
    shapes: Mapping[str, tuple[int, ...]] = base.shapes
    if directories:
        first, *others = directories
        configs = read_configs(first, others)
        for path, own in zip(others, configs.others, strict=True):
            check_config(path, own, configs.dense)
            check_same_vocabulary(first, path)
        shapes = dense_shapes(configs.dense)
    for expert in (base, *experts):
        check_shapes(expert, shapes)


def check_apart(output: Path, inputs: list[str]) -> None:
    """Raises: ValueError: the output is one of the inputs, which overwriting would delete."""
    if output.resolve() in [path.resolve() for path in directories(inputs, field="base, experts")]:
        raise ValueError(f"output={str(output)!r} is one of the inputs; name another directory")


def check_similarity(similarity: Similarity | None) -> None:
    """Raises: ValueError: it compares what the experts say, and here are only files."""
    if similarity is not None and similarity.needs_losses:
        raise ValueError(
            f"similarity={similarity} compares losses on seed data, not files; valid choices: Cosine, Euclidean"
        )


def expansion_estimate(base: Expert, experts: int, written: int) -> Estimate:
    """Of the work on two tensors at a time, and of the experts' files with the base's."""
    return Estimate(working_memory(base.shapes, experts), size_of(base.specs) * (written + 1))
