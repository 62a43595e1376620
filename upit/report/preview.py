"""What ``upit data`` shows: counts of the prepared data, and an example with its loss mask."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from upit.core.batches import IGNORE, Example

TRAINED = "bold green"
LONGEST_TOKENS = 1000  # shown of an example; ours


def print_data(
    parts: Mapping[str, Mapping[str, Any]],
    *,
    facts: Sequence[tuple[str, str]],
    domains: Mapping[str, tuple[int, int]],
    example: Example,
    tokenizer,
    console: Console | None = None,
) -> None:
    """Print the counts of the training and the held-out data, and one example.

    Args:
        parts: counts of ``train`` and ``heldout``: examples, tokens, cut, dropped, reasons, merged; copies if any.
        facts: further lines, name and value.
        domains: training and held-out examples of each domain.
        example: shown as text, what is trained in green.
    """
    console = console or Console()
    table = Table(title="Data")
    table.add_column("")
    for name in parts:
        table.add_column(name, justify="right")
    for field, label in (
        ("examples", "examples"), ("tokens", "tokens"), ("cut", "longer than max_length"), ("dropped", "dropped"),
        ("copies", "copies of held-out ones, left out"), ("merged", "response tokenised apart from its prompt"),
    ):  # fmt: skip
        if any(field in counts for counts in parts.values()):
            table.add_row(label, *[f"{counts[field]:,}" if field in counts else "" for counts in parts.values()])
    table.add_section()
    for domain, counts in domains.items():
        table.add_row(domain, *[f"{count:,}" for count in counts])
    console.print(table)
    for name, found in parts.items():
        for reason, own in found.get("reasons", {}).items():
            console.print(f"{name}: {own['count']:,} dropped: {reason} (first {own['first']})", markup=False)
    for label, value in facts:
        console.print(f"{label}: {value}", markup=False, soft_wrap=True)
    console.print(f"\nExample {example['id']}, {example['domain']}; trained in green:", markup=False, soft_wrap=True)
    console.print(masked_text(example, tokenizer), soft_wrap=True)


def masked_text(example: Example, tokenizer) -> Text:
    """An example's text, special tokens too, what is trained in ``TRAINED``."""
    ids = [int(token) for token in example["input_ids"][:LONGEST_TOKENS]]
    trained = [int(label) != IGNORE for label in example["labels"][:LONGEST_TOKENS]]
    text = Text()
    for is_trained, run in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        decoded = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        text.append(decoded, style=TRAINED if is_trained else "dim")
    if len(example["input_ids"]) > LONGEST_TOKENS:
        text.append(f" ... ({len(example['input_ids']):,} tokens)", style="dim")
    return text
