"""The token view as Markdown, through TensorBoard's own converter."""

import html
import re
from itertools import pairwise

from tensorboard.plugin_util import markdown_to_safe_html

from upit.report.token_text import SYMBOLS, symbol, token_text

NASTY = [
    "<|im_start|>",
    "`",
    "``",
    "*",
    "_a_",
    "\\",
    "|",
    "<b>",
    "$x$",
    "\n",
    "# ",
    " ",
    "&amp;",
    "[a](b)",
    "\\`",
    "1.",
]


def view(experts: list[int]) -> dict:
    return {"layers": [0], "examples": [{"domain": "d", "tokens": NASTY, "experts": [experts]}]}


def test_tensorboard_shows_every_token_as_it_is():
    shown = markdown_to_safe_html(token_text(view(list(range(len(NASTY))))))
    pieces = [html.unescape(piece) for piece in re.findall(r"<code>(.*?)</code>", shown, flags=re.S)]
    expected = [token.replace("`", "ˋ").replace("\n", "⏎").replace(" ", "·") for token in NASTY]
    assert pieces == expected


def test_tokens_of_one_expert_go_together():
    text = token_text(view([3] * 8 + [70] * 8))
    legend, _, heading, _, runs = text.split("\n")
    assert legend == f"First expert of each token: {symbol(3)}, {symbol(70)}"
    assert heading == "**d, layer 0**"
    assert len(runs.split(" ")) == 2
    assert symbol(70).endswith("₇₀")


def test_symbols_are_distinct_and_neighbours_differ_in_shape():
    assert len(set(SYMBOLS)) == len(SYMBOLS)
    shape = {**dict.fromkeys("🔵🟣🔴🟢⚫🟠🟡🟤⚪", "circle"), **dict.fromkeys("🟧🟨🟦🟪🟥🟩⬛⬜🟫", "square")}
    shapes = [shape.get(symbol, "heart") for symbol in SYMBOLS]
    assert all(a != b for a, b in pairwise(shapes))
