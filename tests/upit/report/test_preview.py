"""The preview of data: counts, reasons, and an example whose trained text is marked."""

from io import StringIO

from rich.console import Console

from upit.report.preview import TRAINED, masked_text, print_data


def test_the_trained_text_is_coloured_and_nothing_is_lost(data):
    example = data.train_set[0]
    text = masked_text(example, data.tokenizer)
    assert text.plain == data.tokenizer.decode(list(example["input_ids"]))
    trained = [text.plain[span.start : span.end] for span in text.spans if span.style == TRAINED]
    assert trained == [f"{example['answer']}<|im_end|>"]


def test_counts_and_reasons_are_shown(data):
    reasons = {"null content": {"count": 3, "first": "a.jsonl: example 7"}}
    parts = {
        "train": {
            "examples": 1234,
            "tokens": 56789,
            "cut": 2,
            "dropped": 3,
            "merged": 0,
            "reasons": reasons,
            "copies": 4,
        },
        "heldout": {"examples": 9, "tokens": 10, "cut": 0, "dropped": 0, "merged": 0, "reasons": {}},
    }
    out = StringIO()
    print_data(
        parts,
        facts=[("steps an epoch", "24")],
        domains={"letters": (1234, 9)},
        example=data.train_set[0],
        tokenizer=data.tokenizer,
        console=Console(file=out, width=120),
    )
    shown = out.getvalue()
    for part in ("1,234", "56,789", "train: 3 dropped: null content (first a.jsonl: example 7)", "steps an epoch: 24"):
        assert part in shown
    assert "copies of held-out ones" in shown
