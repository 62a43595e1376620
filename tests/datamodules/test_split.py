"""What is held out, what is trained on and how often, and in which order."""

from collections import Counter

import numpy as np
import pytest

from datamodules.order import DomainBlocks, Drifting
from tests.datamodules.conftest import ready, turns, write_jsonl


def rows(count, start=0):
    return [{"messages": turns(f"What is {i}?", f"{i}")} for i in range(start, start + count)]


def contents(examples) -> list[tuple]:
    return [tuple(row["input_ids"]) for row in examples]


def test_copies_of_held_out_conversations_are_not_trained_on(make_instruction, tmp_path):
    files = [write_jsonl(tmp_path / "a.jsonl", rows(20) * 2), write_jsonl(tmp_path / "b.jsonl", rows(20, 10))]
    module = make_instruction(train_files=files, heldout_fraction=0.2)
    module.prepare_data()
    with pytest.warns(UserWarning, match=r"\d+ training examples are copies of held-out conversations: left out"):
        module.setup("fit")
    assert not set(contents(module.train_set)) & set(contents(module.heldout_set))
    assert Counter(row["domain"] for row in module.heldout_set) == {"a": 4, "b": 4}
    total = len(module.train_set) + len(module.heldout_set) + module.stats["train"]["copies"]
    assert (total, module.stats["train"]["copies"] > 3) == (60, True)


def test_copies_of_a_held_out_file_are_not_trained_on(make_instruction, tmp_path):
    train, heldout = write_jsonl(tmp_path / "a.jsonl", rows(20)), write_jsonl(tmp_path / "b.jsonl", rows(6, 17))
    module = make_instruction(train_files=[train], heldout_files=[heldout])
    module.prepare_data()
    with pytest.warns(UserWarning, match="3 training examples are copies of held-out") as told:
        module.setup("fit")
    assert len(told) == 1, "the held-out file is another domain"
    assert (len(module.train_set), len(module.heldout_set)) == (17, 6)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        make_instruction(train_files=[train], heldout_files=[train, heldout]).prepare_data()


def test_a_held_out_example_that_was_cut_is_left_out(make_instruction, tmp_path):
    long = [{"messages": turns("Hi", "so " * 100)}, {"messages": turns("Ho", "so " * 100)}]
    train, heldout = (
        write_jsonl(tmp_path / "a.jsonl", rows(9) + long),
        write_jsonl(tmp_path / "b.jsonl", rows(4, 50) + long[:1]),
    )
    module = make_instruction(train_files=[train], heldout_files=[heldout])
    module.prepare_data()
    with pytest.warns(UserWarning, match=r"heldout: 1 of \d examples are longer than max_length=96: left out"):
        module.setup("fit")
    assert (len(module.train_set), len(module.heldout_set)) == (11, 4)
    of_all = ready(make_instruction(train_files=[train], heldout_fraction=0.9))
    assert len(of_all.heldout_set) == 9, "drawn from those that fit"


def test_a_small_domain_is_not_held_out_whole(make_instruction, tmp_path):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", rows(n, 100 * n)) for n in (1, 2, 9)]
    module = make_instruction(train_files=files, heldout_fraction=0.9)
    module.prepare_data()
    with pytest.warns(UserWarning, match=r"no examples of \['1'\] are held out"):
        module.setup("fit")
    assert Counter(row["domain"] for row in module.train_set) == {"1": 1, "2": 1, "9": 1}
    assert module.domains == ["2", "9"]


def test_a_slash_in_a_domain_does_not_split_the_tags(make_instruction, tmp_path):
    named = [{**row, "topic": ("a/b", "c")[i % 2]} for i, row in enumerate(rows(20))]
    settings = {"train_files": [write_jsonl(tmp_path / "a.jsonl", named)], "domain_column": "topic"}
    module = ready(make_instruction(**settings, train_domains=["a/b"]))
    assert module.domains == ["a_b", "c"]
    assert {row["domain"] for row in module.train_set} == {"a_b"}
    for row in named[:2]:
        row["topic"] = "a_b"
    write_jsonl(tmp_path / "a.jsonl", named)
    with pytest.raises(ValueError, match="domains 'a_b' and 'a/b'"):
        make_instruction(**settings).prepare_data()


def test_weights_and_caps_of_domains(make_instruction, tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows(20, 100 * i)) for i, name in enumerate("abcd")]
    settings = {"train_files": files, "heldout_fraction": 0.5}
    module = ready(make_instruction(**settings, domain_weights={"a": 2.5, "b": 0.5, "d": 0}, domain_caps={"c": 3}))
    counts = Counter(row["domain"] for row in module.train_set)
    assert counts == {"a": 25, "b": 5, "c": 3}
    assert set(Counter(contents(module.train_set)).values()) == {1, 2, 3}
    seen = sorted(i for row in module.rows for i in row)
    assert seen == list(range(33)), "copies are examples of their own: attention keeps them apart"
    assert len(module.heldout_set) == 40
    with pytest.raises(ValueError, match=r"data\.domain_caps names \['z'\]; the data's domains are \['a', 'b'"):
        ready(make_instruction(**settings, domain_caps={"z": 1}))
    with pytest.raises(ValueError, match=r"data\.domain_weights: a: -1"):
        make_instruction(**settings, domain_weights={"a": -1})


@pytest.mark.parametrize("packing", [True, False])
def test_blocks_are_of_one_domain_each_and_permuted(make_instruction, tmp_path, packing):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows(60, 100 * i)) for i, name in enumerate("abc")]
    module = ready(make_instruction(train_files=files, order="domain_blocks", packing=packing))
    loader = module.train_dataloader()
    orders = set()
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        domains = []
        for batch in loader:
            ids = set(batch["example_ids"].flatten().tolist()) - {-1}
            (domain,) = {module.train_set[i]["domain"] for i in ids}
            domains.append(domain)
        blocks = [name for i, name in enumerate(domains) if i == 0 or domains[i - 1] != name]
        assert sorted(blocks) == ["a", "b", "c"], "each once an epoch"
        assert len(domains) == len(loader)
        orders.add(tuple(blocks))
    assert len(orders) > 1


def test_blocks_leave_out_less_than_a_batch_of_a_domain():
    order = DomainBlocks(np.repeat([0, 1, 2], [10, 12, 3]), 0, batch_rows=4)
    assert len(order) == len(order(0)) == 8 + 12 + 0
    assert len(set(order(0).tolist())) == 20


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
def test_a_drifting_mixture_rises_and_falls_linearly(floor):
    domains = np.repeat(np.arange(3), 3000)
    order = Drifting(domains, 0, floor=floor)
    drawn = domains[order(1)]
    assert sorted(order(1).tolist()) == list(range(9000)), "each row once an epoch"
    assert (order(1) != order(2)).any()
    assert (order(1) == Drifting(domains, 0, floor=floor)(1)).all()
    shares = np.array([[np.mean(part == domain) for part in np.array_split(drawn, 9)] for domain in range(3)])
    assert shares.min() >= floor / 3 - 0.1 * floor - 0.01
    peaks = shares.argmax(axis=1)
    if floor == 0.0:
        assert sorted(peaks.tolist())[0] == 0
        assert sorted(peaks.tolist())[-1] == 8
        assert (shares[peaks == 0][0, 5:] < 0.05).all()
    if floor == 1.0:
        assert abs(shares - 1 / 3).max() < 0.06


def test_an_unknown_order_is_refused(make_instruction):
    with pytest.raises(ValueError, match=r"data\.order='sorted' must be one of"):
        make_instruction(train_files=["a.jsonl"], order="sorted")
