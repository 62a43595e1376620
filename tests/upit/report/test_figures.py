"""Every figure draws, without a warning, from 2 to 64 experts, 1 to 80 layers and 1 to 24 domains."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from upit.report.figures.base import ink, pixels, png
from upit.report.figures.curves import compared_losses, compared_scores, loss_figure, swap_figure
from upit.report.figures.lineage import generations, lineage_figure, short_name
from upit.report.figures.pilot import distance_figure, pilot_figure
from upit.report.figures.routing import domain_figure, load_figure, time_figure, token_figure
from upit.report.figures.seeds import seed_figure
from upit.report.figures.similarity import average_linkage, similarity_figure


def lineage_of(num_experts: int) -> list[dict]:
    entries = [{"expert": i, "kind": "harvested", "step": 9 * i, "epoch": i / 4} for i in range(min(num_experts, 8))]
    for i in range(len(entries), num_experts):
        birth = {"alpha": 0.25, "beta": 0.75, "merge": {"name": "Dare"}, "similarity": 0.5}
        entries.append({"expert": i, "kind": "merged", "parents": [i - 8, i - 1], **birth})
    return entries


def pictures(num_experts: int, num_layers: int, num_domains: int) -> dict:
    generator = np.random.default_rng(0)
    domains = [f"domain_{i}" for i in range(num_domains)]
    counts = torch.from_numpy(generator.integers(0, 99, (num_layers, num_experts, num_domains)))
    counts[:, -1] = 0
    names = [short_name(entry) for entry in lineage_of(num_experts)]
    vectors = generator.normal(size=(num_experts, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    losses = {name: 1.0 + i for i, name in enumerate(domains)}
    checkpoints = [
        {"step": s, "epoch": s / 4, "domains": {d: {"loss": 1.0 / s, "exact_match": 0.1} for d in domains}}
        for s in (1, 2, 3)
    ]
    examples = [
        {
            "domain": domains[i % num_domains],
            "perplexity": (1 + generator.random(num_experts)).tolist(),
            "expert": i % num_experts,
        }
        for i in range(3 * num_domains)
    ]
    tokens = {
        "layers": [0, num_layers - 1],
        "examples": [{"domain": d, "tokens": ["$x", "\n", "_" * 200], "experts": [[0, 1, 1]] * 2} for d in domains],
    }
    fewer = counts[:, : -(-num_experts // 2)]  # before the MoE grew
    snapshots = [
        {"step": s, "counts_DEC": counts if s > 200 else fewer, "shuffled_D": torch.zeros(num_layers)}
        for s in range(100, 400, 9)
    ]
    event = {"kl": 1e-3, "before": losses, "after": losses}
    curves = {"train/loss": ([0, 9], [6.0, 1.0]), "val/loss": ([5, 9], [2.0, 1.0])}
    curves |= {f"val/loss/{d}": ([5, 9], [2.0, 1.0]) for d in domains}
    scores = {"domains": checkpoints[0]["domains"], "average": {"loss": 1.0, "exact_match": 0.1}}
    return {
        "domains": lambda: domain_figure(counts, domains),
        "load": lambda: load_figure(counts),
        "time": lambda: time_figure(snapshots),
        "tokens": lambda: token_figure(tokens, num_experts),
        "lineage": lambda: lineage_figure(lineage_of(num_experts)),
        "similarity": lambda: similarity_figure((vectors @ vectors.T).tolist(), names, "Cosine"),
        "seeds": lambda: seed_figure(examples, names),
        "pilot": lambda: pilot_figure(checkpoints),
        "distance": lambda: distance_figure([{"step": 1, "from_base": 0.1, "from_previous": 0.1}]),
        "loss": lambda: loss_figure(curves, swap_step=5, growth_step=7),
        "swap": lambda: swap_figure(event),
        "swap and growth": lambda: swap_figure(event, event),
        "losses": lambda: compared_losses({f"run{i}": curves for i in range(num_domains)}),
        "scores": lambda: compared_scores({f"run{i}": scores for i in range(num_domains)}),
    }


@pytest.mark.parametrize("size", [(2, 1, 1), (4, 12, 5), pytest.param((64, 80, 24), marks=pytest.mark.slow)], ids=str)
def test_figures_draw_at_any_size(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, draw in pictures(*size).items():
            image = pixels(draw())
            assert image.std() > 5, f"{name} is blank"
            assert max(image.shape) < 6000, f"{name} is too large to look at"


@pytest.mark.parametrize("name", ["load", "similarity", "seeds", "time"])
def test_names_of_rows_and_columns_do_not_overlap(name):
    figure = pictures(64, 80, 5)[name]()
    png(figure)
    for axes in figure.get_axes():
        boxes = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
        assert all(abs(a.y0 - b.y0) > 0.8 * a.height for a, b in pairwise(boxes)), axes.get_title()


def test_token_boxes_are_as_wide_as_their_text():
    tokens = {"layers": [0], "examples": [{"domain": "d", "tokens": ["iiiiWWWW "] * 12, "experts": [[0] * 12]}]}
    figure = token_figure(tokens, 2)
    pixels(figure)
    axes = figure.axes[0]
    written = next(text for text in axes.texts if "₀" in text.get_text())
    last = axes.collections[0].get_paths()[-1].get_extents().transformed(axes.transData)
    assert written.get_window_extent().x1 == pytest.approx(last.x1, abs=4)


def test_average_linkage_equals_the_mean_over_pairs():
    vectors = np.random.default_rng(3).normal(size=(9, 4))
    similarity = np.corrcoef(vectors)
    root = average_linkage(similarity)
    assert sorted(root.leaves) == list(range(9))
    pending = [root]
    while pending:
        cluster = pending.pop()
        if cluster.parts:
            a, b = (part.leaves for part in cluster.parts)
            assert cluster.height == pytest.approx((1 - similarity[np.ix_(a, b)]).mean())
            assert cluster.height >= max(part.height for part in cluster.parts)
            pending += cluster.parts


def test_like_stands_beside_like():
    group = np.array([0, 1, 0, 1, 0, 1])
    root = average_linkage(np.where(group[:, None] == group, 0.9, 0.1))
    assert [int(group[i]) for i in root.leaves] in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])


def test_family_tree():
    lineage = lineage_of(10)
    assert generations(lineage)[7:] == [0, 1, 2]
    assert short_name(lineage[9]) == "9 (1+8)"


def test_generations_do_not_overlap():
    figure = lineage_figure(lineage_of(64))
    png(figure)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert len(boxes) > 5
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_one_generation_is_one_tick():
    axes = lineage_figure(lineage_of(4)).axes[0]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [0]
    assert axes.get_title("left") == "experts: none was merged"


def test_ink_reads_on_its_colour():
    assert (ink("#000000"), ink("#F0E442")) == ("white", "black")
