"""Procedural questions: disjoint, verified by their own task, and a tokenizer of their text."""

import sys
from importlib import import_module

import pytest

from datamodules import ReasoningGymDataModule
from datamodules.reasoning_gym import train_tokenizer
from tests.conftest import FAMILIES
from upit.model.loading.chat_templates import CHATML


def question(data, row) -> str:
    return data.tokenizer.decode(row["input_ids"][: row["prompt_length"]])


def test_training_and_held_out_questions_are_disjoint_and_distinct(data):
    train, heldout = ([question(data, row) for row in rows] for rows in (data.train_set, data.heldout_set))
    assert len(set(train + heldout)) == len(train) + len(heldout)
    assert len(train) == 2 * 120
    assert len(heldout) == 2 * 8
    assert data.domains == ["arithmetic", "letters"]


def test_a_family_in_two_domains_shares_no_question(make_data):
    module = make_data(train_size=40, heldout_size=40)
    family = {"gcd": {"min_value": 2, "max_value": 40}}
    module.families = {"one": family, "two": dict(family)}
    train, heldout = module.make_rows()
    questions = [row["messages"][0]["content"] for row in train + heldout]
    assert len(set(questions)) == len(questions) == 160


def test_the_tasks_own_verifier_decides(data):
    for row in [*data.heldout_set, *data.train_set[:10]]:
        assert data.verify(row, row["answer"])
        assert data.verify(row, f" {row['answer']}\n")
        assert not data.verify(row, "no idea")
        assert not data.verify(row, "")


def test_a_family_whose_questions_depend_on_its_size_is_verified_on_the_same_ones(tmp_path):
    module = ReasoningGymDataModule(
        families={"logic": {"acre": {}}}, train_size=4, heldout_size=4, cache_dir=str(tmp_path)
    )
    for row in module.make_rows()[1]:
        assert module.verify(row, row["messages"][-1]["content"])


def test_the_seed_decides_the_questions(make_data):
    rows = make_data().make_rows()
    assert rows == make_data().make_rows()
    assert rows != make_data(seed=1).make_rows()


def test_a_system_prompt_begins_every_conversation(make_data):
    train, _ = make_data(system_prompt="Be brief.").make_rows()
    assert {row["messages"][0]["content"] for row in train} == {"Be brief."}
    assert {row["messages"][0]["role"] for row in train} == {"system"}


def test_the_families_of_a_domain_share_its_size(make_data):
    module = make_data()
    module.families = {"both": {**FAMILIES["letters"], **FAMILIES["arithmetic"]}}
    train, heldout = module.make_rows()
    families = [row["id"].split(":")[0] for row in train]
    assert families.count("letter_counting") == families.count("chain_sum") == 60
    assert len(heldout) == 8


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ({}, "every domain needs a family"),
        ({"a": {}}, "every domain needs a family"),
        ({"a": {"chain_sums": {}}}, r"no family 'chain_sums'; alike: \['chain_sum'"),
        ({"a": {"gcd": {"least": 1}}}, r"'gcd' can't have the settings .*'least'"),
        ({"a": {"gcd": {"min_value": 9, "max_value": 2}}}, "'gcd' can't have the settings .*max_value must be"),
        (
            {"a": {"chain_sum": {"min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 2}}},
            "distinct questions",
        ),
    ],
)
def test_families_that_cannot_work_are_named(tmp_path, families, message):
    with pytest.raises(ValueError, match=message):
        ReasoningGymDataModule(families=families, train_size=2000, heldout_size=2, cache_dir=str(tmp_path)).make_rows()


@pytest.mark.parametrize("wrong", [{"train_size": 0}, {"heldout_size": 0}, {"vocab_size": 258}], ids=str)
def test_sizes_that_cannot_work_are_refused(make_data, wrong):
    ((field, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"data.{field}={value} must be at least"):
        make_data(**wrong)


def test_a_trained_tokenizer_takes_its_template_from_a_file_too(make_data, tmp_path):
    template = CHATML.replace("im_start|>", "im_start|> ")
    (tmp_path / "t.jinja").write_text(template)
    for given in (template, str(tmp_path / "t.jinja")):
        module = make_data(chat_template=given, train_size=30)
        module.prepare_data()
        module.setup("fit")
        assert module.tokenizer.chat_template == template


@pytest.mark.parametrize("text", ["What is 12 + 345?", "Zählen: ÄÖÜ 中文 🙂\n\ttab", " leading and trailing "])
def test_a_trained_tokenizer_gives_back_any_text(text):
    tokenizer = train_tokenizer(["What is 12 + 30? Count the letters."] * 3, vocab_size=320, chat_template=None)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.chat_template == CHATML
    assert len(tokenizer) <= 320


def test_digits_stand_alone_and_turns_end_in_one_token():
    tokenizer = train_tokenizer(["12345 12345 12345"] * 5, vocab_size=300, chat_template=None)
    assert len(tokenizer("12345")["input_ids"]) == 5
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_without_reasoning_gym_the_extra_is_named(make_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r'pip install "upit\[demo\]"'):
        make_data()


def test_reasoning_gym_is_not_needed_for_data_of_ones_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "datamodules"]:
        monkeypatch.delitem(sys.modules, name)
    import_module("datamodules").InstructionDataModule(tokenizer="org/model", train_files=["org/data"])
