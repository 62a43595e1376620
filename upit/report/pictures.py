"""Every picture of a run, drawn from what it left on disk; TensorBoard, the HTML page and the tests share them."""

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.figure import Figure

from upit.report.figures.curves import loss_figure, swap_figure
from upit.report.figures.lineage import lineage_figure, short_name
from upit.report.figures.pilot import distance_figure, pilot_figure
from upit.report.figures.routing import domain_figure, load_figure, time_figure, token_figure
from upit.report.figures.seeds import seed_figure
from upit.report.figures.similarity import similarity_figure
from upit.report.lineage import in_words
from upit.report.run import Run


class Picture(NamedTuple):
    """A picture by its TensorBoard tag."""

    title: str
    caption: str
    draw: Callable[[Run], Figure | None]  # None where the run has not got that far


def draw(tag: str, run: Run) -> Figure | None:
    return PICTURES[tag].draw(run)


def _loss(run: Run) -> Figure | None:
    events = [event["step"] if event else None for event in (run.swap, run.growth)]
    return loss_figure(run.curves, *events) if run.curves else None


def _pilot(run: Run) -> Figure | None:
    return pilot_figure(run.pilot) if run.pilot else None


def _distance(run: Run) -> Figure | None:
    return distance_figure(run.distances) if run.distances else None


def _similarity(run: Run) -> Figure | None:
    if run.similarity is None or run.lineage is None:
        return None
    return similarity_figure(run.similarity, [short_name(entry) for entry in run.lineage], in_words(run.measure))


def _lineage(run: Run) -> Figure | None:
    return lineage_figure(run.lineage) if run.lineage else None


def _seeds(run: Run) -> Figure | None:
    if run.seeds is None or not run.lineages:
        return None
    return seed_figure(run.seeds["examples"], [short_name(entry) for entry in run.lineages[0]])


def _swap(run: Run) -> Figure | None:
    return swap_figure(run.swap, run.growth) if run.swap else None


def _domains(run: Run) -> Figure | None:
    return domain_figure(run.routing[-1]["counts_DEC"], run.routing[-1]["domains"]) if run.routing else None


def _load(run: Run) -> Figure | None:
    return load_figure(run.routing[-1]["counts_DEC"]) if run.routing else None


def _time(run: Run) -> Figure | None:
    return time_figure(run.routing) if run.routing else None


def _tokens(run: Run) -> Figure | None:
    if not run.routing:
        return None
    latest = run.routing[-1]
    return token_figure(latest["tokens"], latest["counts_DEC"].shape[1])


PICTURES = {
    "eval/loss_curves": Picture(
        "Loss over the whole run",
        "One curve from the first step to the last; the dashed line is the swap from the dense model to the MoE; "
        "a second one is where the MoE got more experts.",
        _loss,
    ),
    "harvest/pilot": Picture(
        "Pilot: are the checkpoints specialists?",
        "Each checkpoint's FFN, in the dense model as it was at the swap, on the held-out domains. The specialist "
        "gain is what picking the best checkpoint for each domain would gain over the best single one: near 0, there "
        "is little diversity to upcycle.",
        _pilot,
    ),
    "harvest/distance": Picture(
        "Distance travelled",
        "How far the FFN weights are from the base model and from the checkpoint before, as parts of the base's norm.",
        _distance,
    ),
    "experts/similarity": Picture(
        "Similarity of the experts",
        "By the run's own measure (the default: cosine of the task vectors against the base model). The dendrogram "
        "(average linkage) puts like beside like; merged experts name their parents.",
        _similarity,
    ),
    "experts/lineage": Picture(
        "Family tree",
        "Where every expert comes from: a checkpoint, or two parents merged with weights alpha and beta; then "
        "the merge and its settings, such as DARE's drop rate. Where the MoE grew, trained experts are the parents.",
        _lineage,
    ),
    "experts/seed_data": Picture(
        "Seed data",
        "Perplexity of every expert on the seed examples of each domain; how many examples preferred each expert and "
        "how many it got once full buckets turned some away; and what it got.",
        _seeds,
    ),
    "moe/swap": Picture(
        "The swap",
        "Held-out loss of each domain right before and right after the dense model became the MoE; and, where the MoE "
        "grew, before and after that.",
        _swap,
    ),
    "router/domains": Picture(
        "Routing by domain",
        "Share of each domain's assignments that goes to each expert, at the latest snapshot. Equal rows mean that "
        "the router does not tell the domains apart.",
        _domains,
    ),
    "router/load": Picture(
        "Load",
        "Assignments of each expert in each layer over an even share, at the latest snapshot.",
        _load,
    ),
    "router/over_time": Picture(
        "Routing over time",
        "Lines are means over the layers, bands their range. Specialisation is real where the mutual information lies "
        "above that of shuffled domains.",
        _time,
    ),
    "router/tokens": Picture(
        "Tokens by expert",
        "One held-out example a domain; each token carries the number and the colour of its first expert.",
        _tokens,
    ),
}
