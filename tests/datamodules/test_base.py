"""Loaders: what a batch holds, order by epoch, state in the middle of one, ranks, held-out batches, prompts."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.datamodules.conftest import ready, turns, write_jsonl
from upit.core.batches import IGNORE, PADDING, block_causal_mask


@pytest.fixture
def make_loaded(make_instruction, tmp_path):
    rows = [{"messages": turns("What is " + "so " * (i % 9), f"{i}")} for i in range(60)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)

    def make(world: int = 1, rank: int = 0, **kwargs):
        module = ready(make_instruction(train_files=[file], **kwargs))
        module.trainer = SimpleNamespace(world_size=world, global_rank=rank)
        return module

    return make


def indices(batch) -> list[int]:
    return sorted(set(batch["example_ids"].flatten().tolist()) - {PADDING})


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_example_at_most_once_as_it_is(make_loaded, packing):
    module = make_loaded(packing=packing)
    seen = []
    for batch in module.train_dataloader():
        for b in range(len(batch["input_ids"])):
            ids_T = batch["example_ids"][b]
            for index in indices({"example_ids": ids_T}):
                own, example = ids_T == index, module.train_set[index]
                assert batch["input_ids"][b][own].tolist() == example["input_ids"]
                assert batch["labels"][b][own].tolist() == example["labels"]
                assert batch["position_ids"][b][own].tolist() == list(range(int(own.sum())))
                seen.append(index)
            assert (batch["labels"][b][ids_T == PADDING] == IGNORE).all()
    assert len(seen) == len(set(seen))
    assert len(module.train_set) - len(seen) < 20, "only the incomplete last batch is left out"


def test_packed_rows_are_full_length_and_hold_several_examples(make_loaded):
    module = make_loaded()
    batches = list(module.train_dataloader())
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(2, 96)}
    assert max(len(indices(batch)) for batch in batches) > 2


def test_every_packed_batch_says_how_long_the_longest_example_of_all_is(make_loaded):
    data = make_loaded(packing=True)
    longest = max(len(example["input_ids"]) for example in data.train_set)
    assert longest < data.max_length
    batches = list(data.train_dataloader())
    assert {batch["longest"] for batch in batches} == {longest}
    assert max(int(batch["lengths"].max()) for batch in batches) <= longest


def test_attention_never_crosses_examples(make_loaded):
    batch = next(iter(make_loaded().train_dataloader()))
    may_see = block_causal_mask(batch)[:, 0]
    ids = batch["example_ids"]
    for b in range(len(ids)):
        for query in range(ids.shape[1]):
            expected = [key <= query and int(ids[b, key]) == int(ids[b, query]) for key in range(ids.shape[1])]
            assert may_see[b, query].tolist() == expected


def test_grouped_batches_pad_to_few_widths(make_loaded):
    module = make_loaded(packing=False)
    for batch in module.train_dataloader():
        assert batch["input_ids"].shape[1] in (64, 96)
        assert all(len(set(row.tolist()) - {PADDING}) == 1 for row in batch["example_ids"])


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_is_another_in_each_epoch_and_the_same_in_each_run(make_loaded, packing):
    def order(module, epoch):
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [indices(batch) for batch in loader]

    one, other = make_loaded(packing=packing), make_loaded(packing=packing)
    assert order(one, 0) == order(other, 0)
    assert order(one, 1) == order(other, 1)
    assert order(one, 0) != order(one, 1)


@pytest.mark.parametrize("packing", [True, False])
def test_the_run_s_seed_orders_the_data_and_does_not_change_it(make_loaded, packing, monkeypatch):
    built_before = make_loaded(packing=packing)

    def order(seed, module=built_before):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        assert module.identity()["order_seed"] == seed or module is not built_before
        return [indices(batch) for batch in module.train_dataloader()]

    again = make_loaded(packing=packing)
    assert order(1) == order(1, again)
    assert order(1) != order(2)
    assert order(2, make_loaded(packing=packing, order_seed=1)) == order(1)
    assert order(2, make_loaded(packing=packing, order_seed=0)) == order(0), "data.seed's own default"
    assert built_before.train_set == again.train_set
    assert built_before.heldout_set == again.heldout_set
    assert built_before.rows == again.rows


def test_the_run_s_seed_may_be_set_after_the_module_is_built(make_instruction, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns("Hi", f"{i}")} for i in range(60)])
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    module = make_instruction(train_files=[file], num_workers=1)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert ready(module).train_dataloader().sampler.seed == 7
    assert module.identity()["order_seed"] == 7
    other = ready(make_instruction(train_files=[file], order_seed=7))
    assert other.identity() == module.identity(), "the number of workers is no part of it"
    assert ready(make_instruction(train_files=[file], packing=False)).identity() != module.identity()
    assert json.loads(json.dumps(module.identity())) == module.identity()


@pytest.mark.parametrize("packing", [True, False])
def test_state_in_the_middle_of_an_epoch_for_any_number_of_workers(make_loaded, packing):
    loader = make_loaded(packing=packing, num_workers=1).train_dataloader()
    loader.sampler.set_epoch(1)
    rest, state = [], None
    for number, batch in enumerate(loader):
        if number == 1:
            state = loader.state_dict()
        elif number > 1:
            rest.append(batch["input_ids"])
    assert state == {"epoch": 1, "batches_done": 2}
    for num_workers in (0, 2):
        resumed = make_loaded(packing=packing, num_workers=num_workers).train_dataloader()
        resumed.load_state_dict(state)
        resumed.sampler.set_epoch(1)
        again = [batch["input_ids"] for batch in resumed]
        assert len(again) == len(rest) > 0
        assert all(torch.equal(a, b) for a, b in zip(again, rest, strict=True))
        assert len(list(resumed)) == len(resumed), "the next iteration is a whole epoch"


@pytest.mark.parametrize("packing", [True, False])
def test_two_ranks_share_the_batches_of_one(make_loaded, packing):
    def batches(world, rank):
        return [indices(batch) for batch in make_loaded(world, rank, packing=packing, batch_size=4).train_dataloader()]

    whole, halves = batches(1, 0), [batches(2, rank) for rank in (0, 1)]
    assert len(halves[0]) == len(halves[1])
    for one, *two in zip(whole, *halves, strict=True):
        assert one == sorted(two[0] + two[1])


def test_a_batch_that_the_ranks_cannot_share_is_refused(make_loaded):
    with pytest.raises(ValueError, match=r"data\.batch_size=3 must be divisible by the 2 processes"):
        make_loaded(world=2, batch_size=3).train_dataloader()


def test_packed_data_that_fills_no_batch_is_refused(make_loaded):
    with pytest.raises(ValueError, match=r"data\.batch_size=64"):
        make_loaded(batch_size=64).train_dataloader()


@pytest.mark.parametrize(("world", "batch_size"), [(1, 64), (1, 8), (2, 8), (2, 2), (3, 3)])
def test_grouped_batches_hold_each_example_once_an_epoch(make_loaded, world, batch_size):
    seen, numbers = [], set()
    for rank in range(world):
        batches = list(make_loaded(world, rank, packing=False, batch_size=batch_size).train_dataloader())
        numbers.add(len(batches))
        seen += [index for batch in batches for index in indices(batch)]
    assert sorted(seen) == list(range(57))
    assert len(numbers) == 1, "the ranks keep step"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_examples_count_once_over_all_ranks(make_loaded, world):
    counted, steps = [], set()
    for rank in range(world):
        module = make_loaded(world, rank, heldout_fraction=0.3, eval_batch_tokens=128)
        batches = list(module.val_dataloader())
        steps.add(len(batches))
        counted += [i for batch in batches for i in indices(batch)]
        assert all(batch["input_ids"].numel() <= 128 for batch in batches)
    assert sorted(counted) == list(range(len(module.heldout_set)))
    assert len(steps) == 1


def test_prompts_to_answer(make_loaded, tmp_path):
    rows = [{"prompt": "Hi", "mine": 1}, {"messages": turns("Hi", "Yes.", "Why?")}, {"prompt": "What is so so so?"}]
    module = make_loaded(predict_file=write_jsonl(tmp_path / "prompts.jsonl", rows))
    (batch,) = module.predict_dataloader()
    tokenizer = module.tokenizer
    for b, row in enumerate(rows):
        messages = row.get("messages") or turns(row["prompt"])
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(batch["input_ids"][b][batch["attention_mask"][b].bool()]) == expected
        assert batch["attention_mask"][b].sort().values.equal(batch["attention_mask"][b]), "padded on the left"
    assert batch["index"].tolist() == [0, 1, 2]
    assert module.predict_set == rows


def test_a_system_prompt_stands_before_prompts_without_their_own(make_data, tmp_path):
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": "Hi"}, {"messages": turns("Hi", "Yes.", "Why?")}, {"messages": own}]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    module = ready(make_data(system_prompt="Be brief.", train_size=30, predict_file=prompts))
    (batch,) = module.predict_dataloader()
    texts = [
        module.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert ["Be brief." in text for text in texts] == [True, True, False]
    assert texts[0] == module.tokenizer.apply_chat_template(
        turns("Hi", system="Be brief."), add_generation_prompt=True, tokenize=False
    )


def test_prompts_that_are_not_there_are_named(make_loaded, tmp_path):
    with pytest.raises(ValueError, match=r"data\.predict_file is not set"):
        make_loaded().predict_dataloader()
    with pytest.raises(FileNotFoundError, match=r"data\.predict_file: .*nowhere"):
        make_loaded(predict_file=str(tmp_path / "nowhere.jsonl")).predict_dataloader()
    unnamed = write_jsonl(tmp_path / "unnamed.jsonl", [{"prompt": "Hi"}, {"query": "Hi"}])
    with pytest.raises(ValueError, match=r"unnamed\.jsonl: prompt 2"):
        make_loaded(predict_file=unnamed).predict_dataloader()
    (tmp_path / "text.jsonl").write_text('"just text"\n')
    with pytest.raises(ValueError, match=r"text\.jsonl: prompt 1: not an object of columns; got 'just text'"):
        make_loaded(predict_file=str(tmp_path / "text.jsonl")).predict_dataloader()
    (tmp_path / "broken.jsonl").write_text(json.dumps({"prompt": "Hi"}) + "\n{\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl:2"):
        make_loaded(predict_file=str(tmp_path / "broken.jsonl")).predict_dataloader()
