"""Seed data: how well each expert knows each domain, and which examples it was given."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from upit.report.figures.base import canvas, colours, extent, heatmap


def seed_figure(examples: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Perplexity by expert and domain, bucket sizes before and after the capacity, and what the buckets hold.

    Args:
        examples: ``{"domain", "perplexity": [one an expert], "expert"}`` each.
        names: label of each expert.
    """
    domains = sorted({example["domain"] for example in examples})
    domain_S = np.array([domains.index(example["domain"]) for example in examples])
    log_SN = np.log(np.array([example["perplexity"] for example in examples]))
    owner_S = np.array([example["expert"] for example in examples])
    num_experts = len(names)
    mean_NC = np.stack([log_SN[domain_S == c].mean(0) for c in range(len(domains))], axis=1)

    columns = extent(len(domains), each=0.55, least=2.6, most=10)
    figure = canvas(2 * columns + 5.0, extent(num_experts, each=0.27, least=2.0, most=15) + 1.6)
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[columns, 2.4, columns])
    excess_NC = np.exp(mean_NC - mean_NC.min(0))  # domains differ far more than experts do
    unit = "over the domain's lowest"
    heatmap(left, excess_NC, rows=names, columns=domains, unit=unit, low=1.0, text=".2f", numbers=np.exp(mean_NC))
    left.set_title("perplexity (geometric mean)", fontsize=9)
    left.set_ylabel("expert")
    _bucket_bars(middle, log_SN.argmin(1), owner_S, num_experts)
    held = np.zeros((num_experts, len(domains)), dtype=int)
    np.add.at(held, (owner_S, domain_S), 1)
    heatmap(right, held, rows=names, columns=domains, unit="seed examples", text="d")
    right.set_title("domains in the bucket", fontsize=9)
    return figure


def _bucket_bars(axes, wish_S: np.ndarray, owner_S: np.ndarray, num_experts: int) -> None:
    rows = np.arange(num_experts)
    orange, blue = colours(2)[::-1]
    for values, shift, colour in ((wish_S, -0.2, orange), (owner_S, 0.2, blue)):
        sizes = np.bincount(values, minlength=num_experts)
        axes.barh(rows + shift, sizes, height=0.38, color=colour)
    axes.set_title("examples that prefer it (orange)\nand that it got (blue)", fontsize=9)
    axes.set_xlabel("seed examples")
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
