"""What the callbacks see of the trainer's module and data; they import neither."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from upit.preparation.expert import Expert


class UpcyclingModule(Protocol):
    """A LightningModule that passes from dense to MoE."""

    phase: str
    swap_step: int | None
    grown: bool
    growth_step: int | None
    owed_step: int | None  # of an event that is planned and has not happened
    moe: Any  # has num_experts and top_k
    phases: Sequence[Any]  # the modules that are active in turn; have compile_layers
    lm: PreTrainedModel

    def outline(self) -> PreTrainedModel | None: ...
    def upcycle(self, experts: Sequence[Expert], router_DEH: Tensor) -> None: ...
    def plan_harvest(self, steps: Sequence[int]) -> None: ...
    def plan_swap(self, step: int) -> None: ...
    def metrics_by(self, step: int) -> Collection[str]: ...
    def grow(self, experts: Sequence[Expert], router_DEH: Tensor) -> None: ...
    def plan_growth(self, num_experts: int, step: int | None = None) -> None: ...
    def check_finite(self) -> None: ...  # raises; a collective
    def steps_per_epoch(self) -> int: ...
    def total_steps(self) -> int: ...
    def identity(self) -> dict[str, Any]: ...
    def autocast(self) -> AbstractContextManager: ...
    def score(self, track=...) -> dict[str, Any]: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


def upcycles(module: Any) -> bool:
    """Whether a module can pass from dense to MoE."""
    return hasattr(module, "upcycle") and hasattr(module, "plan_swap")


def require_upcycling(module: Any, callback: object) -> None:
    if not upcycles(module):
        raise TypeError(
            f"{type(callback).__name__} needs a module that passes from dense to MoE, such as "
            f"lightning_modules.UpITModule; got {type(module).__name__}"
        )
