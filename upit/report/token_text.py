"""The token view as Markdown: TensorBoard strips colour from texts, so coloured symbols stand for the experts."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from upit.report.figures.routing import SUBSCRIPTS, visible

# neighbours differ in shape, colour and lightness, for readers who can't tell some of the colours apart
SYMBOLS = "🔵🟧💚🟣🟨🖤🔴🟦🧡🟢🟪💛⚫🟥💙🟠🟩💜🟡⬛🤍🟤⬜🤎⚪🟫"


def token_text(tokens: Mapping[str, Any]) -> str:
    """Examples in which each run of tokens with the same first expert follows its symbol and number, and a legend.

    Args:
        tokens: of :func:`upit.evaluation.routing.token_view`, which also bounds the length.
    """
    seen = sorted({expert for example in tokens["examples"] for layer in example["experts"] for expert in layer})
    blocks = ["First expert of each token: " + ", ".join(symbol(expert) for expert in seen)]
    for example in tokens["examples"]:
        for layer, experts in zip(tokens["layers"], example["experts"], strict=True):
            blocks += [f"**{example['domain']}, layer {layer}**", _runs(example["tokens"], experts)]
    return "\n\n".join(blocks)


def symbol(expert: int) -> str:
    """Of an expert, with its number; symbols begin anew after the last, and the number alone tells experts apart."""
    return f"{SYMBOLS[expert % len(SYMBOLS)]}\u2060{str(expert).translate(SUBSCRIPTS)}"  # a joiner: one line for both


def _runs(tokens: Sequence[str], experts: Sequence[int]) -> str:
    runs = []
    for expert, own in groupby(zip(tokens, experts, strict=True), key=lambda pair: pair[1]):
        text = "".join(visible(token) for token, _ in own).replace("`", "ˋ")  # a backtick would end the code
        runs.append(f"{symbol(expert)}\u00a0`{text}`")
    return " ".join(runs)
