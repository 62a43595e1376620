"""Where an expert comes from, in words."""

from collections.abc import Mapping
from typing import Any


def origin(entry: Mapping[str, Any]) -> str:
    """Where an expert of a lineage comes from, in words."""
    trained = f", post-trained to step {entry['trained_to']}" if "trained_to" in entry else ""
    return _birth(entry) + trained


def _birth(entry: Mapping[str, Any]) -> str:
    kind = entry["kind"]
    if kind == "merged":
        j, k = entry["parents"]
        return f"{entry['alpha']:.2f} x expert {j} + {entry['beta']:.2f} x expert {k}, {in_words(entry['merge'])}"
    place = f" in {entry['path']}" if "path" in entry else ""
    if kind == "harvested":
        return f"checkpoint of step {entry['step']} (epoch {entry['epoch']:.2f}){place}"
    if kind == "base":
        return "the model before instruction tuning"
    if kind == "checkpoint":
        return f"checkpoint{place}"
    return in_words(entry["source"])


def in_words(strategy: Mapping[str, Any]) -> str:
    """A strategy's description in words: its name, and its arguments in brackets."""
    arguments = ", ".join(f"{name} {value}" for name, value in strategy.items() if name != "name")
    return f"{strategy['name']} ({arguments})" if arguments else strategy["name"]
