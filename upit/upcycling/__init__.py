"""Stage 4: the MoE, put together, grown and exported."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upit.upcycling.growth import MergedRows, NewRows, RandomRows
    from upit.upcycling.non_experts import LastNonExperts, MeanNonExperts, NamedNonExperts, NonExperts

__all__ = [
    "LastNonExperts",
    "MeanNonExperts",
    "MergedRows",
    "NamedNonExperts",
    "NewRows",
    "NonExperts",
    "RandomRows",
]
_MODULES = {  # imported when a class is asked for: they import transformers, and some stages on files do not
    "NonExperts": "non_experts",
    "LastNonExperts": "non_experts",
    "MeanNonExperts": "non_experts",
    "NamedNonExperts": "non_experts",
    "NewRows": "growth",
    "MergedRows": "growth",
    "RandomRows": "growth",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
