"""Where the experts come from: the harvest, copies of one model, or checkpoints on disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from upit.core.choice import Strategy
from upit.core.distributed import on_rank_zero
from upit.core.files import digest, seeded
from upit.core.progress import Track, untracked
from upit.core.tensor_files import TensorFiles, open_tensors
from upit.preparation.compatibility import check_config, check_shapes, check_vocabulary
from upit.preparation.expert import Expert
from upit.preparation.placement import write_ffn
from upit.preparation.pool import Pool, write_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


class ExpertSource(Strategy):
    """Gives the pool that expansion starts from."""

    @property
    def whole(self) -> bool:
        """Whether the experts come with the other parameters of their checkpoints."""
        return True

    def check(self, dense: PreTrainedModel, tokenizer) -> None:
        """Raises: ValueError: what would fail at the swap; called before the run, with the dense model's outline."""
        return

    @abstractmethod
    def experts(
        self,
        harvest: Pool,
        dense: PreTrainedModel,
        *,
        num_experts: int,
        output: Path,
        seed: int = 0,
        track: Track = untracked,
    ) -> list[Expert]:
        """The experts to start from; a collective, in which rank 0 writes.

        Args:
            harvest: the harvested pool.
            dense: the model at the swap.
            num_experts: experts that the MoE will have.
            output: directory for experts that are made here.
            track: wraps the tensor names of each, for a progress bar.
        """

    def metrics(self, harvested: Sequence[Collection[str]], num_experts: int) -> Sequence[Collection[str]]:
        """For each expert, the names of the metrics that it will come with; known before the run.

        Args:
            harvested: the same of each harvested checkpoint.
            num_experts: experts that the MoE will have.
        """
        return harvested

    @abstractmethod
    def count(self, harvested: int, num_experts: int) -> int:
        """How many experts there will be when ``harvested`` checkpoints were; known before the run."""


class Harvested(ExpertSource):
    """The harvested checkpoints of the dense phase (UpIT, arXiv:2410.01610).

    Args:
        keep: which part of the run; the halves share the middle one of an odd number.
        base: keep the model before instruction tuning as one expert, the first.
    """

    def __init__(self, keep: Literal["all", "first_half", "second_half"] = "all", base: bool = False) -> None:
        self.keep = keep
        self.base = base

    def experts(self, harvest, dense, *, num_experts, output, seed=0, track=untracked):
        kept = self._kept(harvest.experts)
        pool = [harvest.base, *kept] if self.base else kept
        return [replace(expert, origin={**expert.origin, "source": self.describe()}) for expert in pool]

    def _kept(self, found: Sequence[T]) -> list[T]:
        half = len(found) // 2
        return list({"all": found, "first_half": found[: len(found) - half], "second_half": found[half:]}[self.keep])

    def metrics(self, harvested, num_experts):
        return [*([()] if self.base else []), *self._kept(harvested)]

    def count(self, harvested, num_experts):
        return self.base + (harvested if self.keep == "all" else -(-harvested // 2))


class _Clones(ExpertSource):
    """N experts made of the dense model at the swap."""

    kind: str

    @property
    def whole(self):
        return False

    def alter(self, name: str, tensor: Tensor, *key: Any) -> Tensor:
        """One tensor of one expert.

        Args:
            key: seed and number of the expert, for what is drawn.
        """
        return tensor

    @property
    def exact(self) -> bool:
        """Whether all clones are the model itself, so that one file serves them all."""
        return False

    def experts(self, harvest, dense, *, num_experts, output, seed=0, track=untracked):
        file = output / "dense.safetensors"
        sha256 = write_ffn(dense, file)
        original = Expert(file, sha256, str(dense.dtype).removeprefix("torch."))
        return [self._clone(original, i, output, seed, track) for i in range(num_experts)]

    def _clone(self, original: Expert, i: int, output: Path, seed: int, track: Track) -> Expert:
        origin = {"kind": self.kind, "source": self.describe(), "copy": i}
        if self.exact:
            return Expert(original.file, original.sha256, original.dtype, origin=origin)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in track(original.shapes, f"(copy {i + 1})"):
                tensor = original.read(name)
                yield name, self.alter(name, tensor.float(), seed, i).to(tensor.dtype)

        path = output / f"{self.kind}_{i:02d}.safetensors"
        key = digest([original.sha256, self.key(), seed, i])
        sha256 = on_rank_zero(lambda: write_once(path, tensors(), original.specs, key))
        return Expert(path, sha256, original.dtype, origin=origin)

    def count(self, harvested, num_experts):
        return num_experts

    def metrics(self, harvested, num_experts):
        return [()] * num_experts


class Copies(_Clones):
    """Copies of the dense model at the swap: vanilla upcycling (arXiv:2212.05055), or with noise.

    Args:
        noise_std: standard deviation of Gaussian noise on every expert, in units of each tensor's own standard
            deviation; 0 gives plain copies.
    """

    kind = "copy"

    def __init__(self, noise_std: float = 0.0) -> None:
        if noise_std < 0:
            raise ValueError(f"Copies.noise_std={noise_std} must not be negative")
        self.noise_std = noise_std

    @property
    def exact(self):
        return self.noise_std == 0

    def alter(self, name, tensor, *key):
        noise = torch.randn(tensor.shape, generator=seeded(*key, name), dtype=torch.float32)
        return tensor + self.noise_std * tensor.std() * noise


class DropUpcycling(_Clones):
    """Copies with a random part of the intermediate dimensions drawn anew (Drop-Upcycling, arXiv:2502.19261).

    Each expert draws its own dimensions in each layer. In gate, up and down projection alike their weights are
    replaced by normal ones with the mean and standard deviation of the weights replaced.

    Args:
        ratio: part of the intermediate dimensions, in (0, 1]; 0.5 is that paper's.
    """

    kind = "drop_upcycling"

    def __init__(self, ratio: float = 0.5) -> None:
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"DropUpcycling.ratio={ratio} must lie in (0, 1]")
        self.ratio = ratio

    def alter(self, name, tensor, *key):
        layer, axis = name.rsplit(".", 2)[0], 1 if "down_proj" in name else 0
        size = tensor.shape[axis]
        drawn = torch.randperm(size, generator=seeded(*key, layer))[: int(self.ratio * size)]
        old = tensor.index_select(axis, drawn)
        new = torch.randn(old.shape, generator=seeded(*key, name), dtype=torch.float32) * old.std() + old.mean()
        return tensor.index_copy(axis, drawn, new)


class Checkpoints(ExpertSource):
    """Experts from elsewhere, such as domain experts of one base model (Branch-Train-MiX, arXiv:2403.07816).

    Args:
        paths: transformers directories with safetensors (sharded too), or pools harvested by another run, of which
            every expert is taken; may hold wildcards. Their architecture and vocabulary must be the dense model's.
    Raises: ValueError: no path is given, one matches nothing, or is neither.
    """

    def __init__(self, paths: list[str]) -> None:
        if not paths:
            raise ValueError("Checkpoints.paths is empty: name transformers directories or harvested pools")
        self.paths = paths
        for path in self._directories():
            if not _is_pool(path):
                open_tensors(str(path), "Checkpoints.paths")

    def check(self, dense, tokenizer):
        from transformers import AutoConfig

        shapes = {name: tuple(param.shape) for name, param in dense.named_parameters()}
        for path in self._directories():
            if not _is_pool(path):
                own = AutoConfig.from_pretrained(path, trust_remote_code=False)
                check_config(path, own, dense.config)
                check_vocabulary(path, tokenizer)
            for expert in Pool.load(path).experts if _is_pool(path) else [_expert_of_model(path)]:
                check_shapes(expert, shapes)

    def _directories(self) -> list[Path]:
        return directories(self.paths, field="Checkpoints.paths")

    def experts(self, harvest, dense, *, num_experts, output, seed=0, track=untracked):
        found: list[Expert] = []
        for path in self._directories():
            for expert in experts_at(path):
                check_shapes(expert, harvest.base.shapes)
                found.append(replace(expert, origin={**expert.origin, "source": self.describe()}))
        return found

    @property
    def whole(self):
        pools = [Pool.load(path) for path in self._directories() if _is_pool(path)]
        return all(expert.rest for pool in pools for expert in pool.experts)

    def metrics(self, harvested, num_experts):
        pools = [Pool.load(path).experts if _is_pool(path) else None for path in self._directories()]
        return [names for pool in pools for names in ([()] if pool is None else map(set, (e.metrics for e in pool)))]

    def count(self, harvested, num_experts):
        return sum(len(Pool.load(path).experts) if _is_pool(path) else 1 for path in self._directories())


def directories(patterns: Iterable[str], *, field: str) -> list[Path]:
    """The paths that patterns with wildcards match, in order; one that is there as it is written stands for itself.

    Raises: ValueError: one matches nothing; names the field.
    """
    found: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob(pattern))
        if not matches:
            raise ValueError(f"{field}: nothing is at {pattern!r}")
        found += map(Path, matches)
    return found


def _is_pool(path: Path) -> bool:
    return (path / "manifest.json").exists()


def experts_at(path: Path) -> list[Expert]:
    """The experts of a pool, or the one that is a transformers directory.

    Raises: TensorFileError: the path is neither, or a file is broken.
    """
    return _experts_of_pool(path) if _is_pool(path) else [_expert_of_model(path)]


def _experts_of_pool(path: Path) -> list[Expert]:
    pool = Pool.load(path)
    pool.verify()
    return [replace(expert, origin={**expert.origin, "path": str(path)}) for expert in pool.experts]


def _expert_of_model(path: Path) -> Expert:
    """A checkpoint directory as an expert, known by its files' names, sizes and times."""
    tensors = TensorFiles(path)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return Expert(path, tensors.stamp, dtype, origin={"kind": "checkpoint", "path": str(path)}, rest=path)
