"""What every router initialisation promises, and the random one."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upit.core.choice import Strategy
from upit.core.progress import Autocast
from upit.core.tensor_files import TensorFiles, open_tensors
from upit.core.tensor_header import read_header
from upit.preparation.compatibility import check_architecture
from upit.preparation.expert import Expert
from upit.router_init.scoring import Seeds

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class RouterInit(Strategy):
    """Where the router's weight comes from; works with experts from any source.

    Row i of a layer's weight is expert i's. ``D`` layers, ``E`` experts, ``H`` hidden.
    """

    @property
    def trains_experts(self) -> bool:
        """Whether the experts are trained along with the router."""
        return False

    def check(self, dense: PretrainedConfig, num_experts: int) -> None:
        """Raises: ValueError: what would fail at the swap; called before the run."""
        return

    @abstractmethod
    def __call__(
        self,
        dense: PreTrainedModel,
        experts: Sequence[Expert],
        seeds: Seeds,
        data,
        *,
        directory: Path,
        seed: int = 0,
        autocast: Autocast = nullcontext,
        track: Callable[[Iterable], Iterable] = lambda experts: experts,
    ) -> tuple[list[Expert], Tensor]:
        """Initialise the router; a collective.

        Args:
            dense: model in evaluation mode. Overwrite its FFN only while it is borrowed, see
                :func:`upit.preparation.placement.borrowed`.
            seeds: scored and assigned seed data.
            data: data module, for ``train_set`` and ``tokenizer``.
            directory: for what is worth keeping of an interrupted initialisation.
            track: wraps the work, for a progress bar.
        Returns: the experts, which may have been trained along, and ``router_DEH``, float32, on the CPU. The caller
            checks both with :func:`upit.preparation.checks.checked_initialisation`.
        """


class WithoutData(RouterInit):
    """An initialisation that needs nothing but the dense model's config."""

    def __call__(self, dense, experts, seeds, data, *, directory, seed=0, autocast=nullcontext, track=iter):
        return list(experts), self.weights(dense.config, len(experts), seed=seed)

    @abstractmethod
    def weights(self, dense: PretrainedConfig, num_experts: int, *, seed: int = 0) -> Tensor:
        """``router_DEH``, float32, on the CPU."""


class RandomRouter(WithoutData):
    """Stock transformers' own: normal, with the config's ``initializer_range`` (the paper's "no initialisation")."""

    def weights(self, dense, num_experts, *, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (dense.num_hidden_layers, num_experts, dense.hidden_size)
        return torch.randn(shape, generator=generator, dtype=torch.float32) * dense.initializer_range


class FromFile(WithoutData):
    """Routers that ``upit init-router`` wrote.

    Args:
        path: its ``router.safetensors``.
    Raises: ValueError: no such file, or it is of another model: its shape, or the architecture it was written for.
    """

    def __init__(self, path: str) -> None:
        open_tensors(path, "FromFile.path")
        self.path = path

    def check(self, dense, num_experts):
        files = open_tensors(self.path, "FromFile.path")
        found = files["router"].shape if "router" in files else None
        shape = (dense.num_hidden_layers, num_experts, dense.hidden_size)
        if found != shape:
            raise ValueError(
                f"FromFile.path={self.path!r} holds a router of shape {found}, the model needs {shape} "
                "(layers, experts, hidden): write it with upit init-router from the same model and as many experts"
            )
        _, metadata = read_header(files["router"].file)
        if "architecture" in metadata:
            check_architecture(Path(self.path), json.loads(metadata["architecture"]), dense)

    def weights(self, dense, num_experts, *, seed=0):
        self.check(dense, num_experts)
        return TensorFiles(Path(self.path)).read("router")
