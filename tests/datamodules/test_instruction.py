"""Instruction data from files: formats, columns, what is cut, held out, cached, and what is refused."""

import hashlib
import json
import shutil
import warnings
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tests.datamodules.conftest import ready, turns, write_jsonl
from upit.core.batches import IGNORE

ROWS = [{"messages": turns(f"What is {i} + {i}?", f"{2 * i}")} for i in range(20)]
PAIRS = [{"question": f"What is {i} + {i}?", "reply": f"{2 * i}", "topic": ("sums", "more")[i % 2]} for i in range(20)]


def texts(module) -> list[str]:
    return sorted(module.tokenizer.decode(row["input_ids"]) for row in module.train_set + module.heldout_set)


def rendered(module, rows) -> list[str]:
    return sorted(module.tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows)


def as_jsonl(folder):
    return write_jsonl(folder / "sums.jsonl", ROWS)


def as_json(folder):
    (folder / "sums.json").write_text(json.dumps(ROWS, indent=1))
    return str(folder / "sums.json")


def as_parquet(folder):
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "sums.parquet")
    return str(folder / "sums.parquet")


@pytest.mark.parametrize("write", [as_jsonl, as_json, as_parquet])
def test_every_format_gives_the_same_examples(make_instruction, tmp_path, write):
    module = ready(make_instruction(train_files=[write(tmp_path)]))
    assert texts(module) == rendered(module, ROWS)
    assert {row["domain"] for row in module.train_set} == {"sums"}
    assert len({row["id"] for row in module.train_set + module.heldout_set}) == 20


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_of_jsonl_ends_at_a_newline_alone(make_instruction, tmp_path, separator):
    """JSON allows these in a string; Python's splitlines ends a line there."""
    rows = [{"messages": turns(f"What is{separator}{i}?", f"{i}")} for i in range(5)]
    module = ready(make_instruction(train_files=[write_jsonl(tmp_path / "rows.jsonl", rows)]))
    assert texts(module) == rendered(module, rows)


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_dataset_folder(make_instruction, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "my_dataset"
    folder.mkdir()
    if kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(folder / "train.parquet")
    else:
        write_jsonl(folder / "train.jsonl", ROWS)
    module = ready(make_instruction(dataset=str(folder)))
    assert texts(module) == rendered(module, ROWS)
    assert {row["domain"] for row in module.train_set} == {"my_dataset"}


def test_prompt_and_response_columns_with_a_domain_column(make_instruction, tmp_path):
    file = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    module = ready(
        make_instruction(train_files=[file], prompt_column="question", response_column="reply", domain_column="topic")
    )
    rows = [{"messages": turns(pair["question"], pair["reply"])} for pair in PAIRS]
    assert texts(module) == rendered(module, rows)
    assert module.domains == ["more", "sums"]
    for row in module.train_set:
        number = int(row["id"].rsplit(":", 1)[1]) - 1
        assert row["domain"] == PAIRS[number]["topic"]
        assert row["answer"] == PAIRS[number]["reply"]


def test_one_domain_a_file_and_held_out_of_each(make_instruction, tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", ROWS) for name in ("one", "two")]
    module = ready(make_instruction(train_files=files, heldout_fraction=0.2))
    assert sorted(row["domain"] for row in module.heldout_set) == ["one"] * 4 + ["two"] * 4


def test_held_out_and_training_examples_are_disjoint(make_instruction, tmp_path):
    module = ready(make_instruction(train_files=[as_jsonl(tmp_path)], heldout_fraction=0.3))
    train, heldout = ({row["id"] for row in rows} for rows in (module.train_set, module.heldout_set))
    assert not train & heldout
    assert (len(train), len(heldout)) == (14, 6)
    other = ready(make_instruction(train_files=[as_jsonl(tmp_path)], heldout_fraction=0.3, seed=1))
    assert {row["id"] for row in other.heldout_set} != heldout


def test_held_out_files_are_used_whole(make_instruction, tmp_path):
    train, heldout = write_jsonl(tmp_path / "a.jsonl", ROWS[:15]), write_jsonl(tmp_path / "b.jsonl", ROWS[15:])
    module = ready(make_instruction(train_files=[train], heldout_files=[heldout]))
    assert (len(module.train_set), len(module.heldout_set)) == (15, 5)


def test_another_chat_template_as_text_or_file(make_instruction, tmp_path):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    (tmp_path / "t.jinja").write_text(template)
    for given in (template, str(tmp_path / "t.jinja")):
        module = ready(make_instruction(train_files=[as_jsonl(tmp_path)], chat_template=given))
        assert texts(module)[0].startswith("user: What is")


# --- length -------------------------------------------------------------------------------------------


def test_cut_and_dropped_examples_are_counted_and_reported(make_instruction, tmp_path):
    long_answer = {"messages": turns("Hi", "so " * 100)}
    long_prompt = {"messages": turns("why " * 80, "42")}
    rows = [*ROWS[:10], long_answer, long_prompt, long_prompt]
    heldout = write_jsonl(tmp_path / "heldout.jsonl", ROWS[10:])
    module = make_instruction(train_files=[write_jsonl(tmp_path / "a.jsonl", rows)], heldout_files=[heldout])
    module.prepare_data()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        module.setup("fit")
    texts = [str(warning.message) for warning in warned]
    assert "train: 1 of 13 examples are longer than max_length=96: cut" in texts
    first = f"{tmp_path / 'a.jsonl'}:12"
    assert f"train: 2 of 13 examples are dropped: 2: no response within max_length (first {first})" in texts
    assert module.stats["train"]["cut"] == 1
    assert module.stats["train"]["dropped"] == 2
    assert len(module.train_set) == module.stats["train"]["examples"] == 11
    assert max(len(row["input_ids"]) for row in module.train_set) == 96
    assert all(any(label != IGNORE for label in row["labels"]) for row in module.train_set)


def test_nothing_is_reported_where_nothing_is_cut(make_instruction, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(make_instruction(train_files=[as_jsonl(tmp_path)]))


def test_no_response_left_is_an_error_with_the_remedy(make_instruction, tmp_path):
    module = make_instruction(train_files=[as_jsonl(tmp_path)], max_length=8)
    with pytest.raises(ValueError, match=r"none of the 20 train examples has a response.*data.max_length=8.*raise it"):
        module.prepare_data()
    assert not (module.folder / "stats.json").exists()


# --- the cache ----------------------------------------------------------------------------------------


@pytest.fixture
def tokenisings(monkeypatch):
    """Names of what was tokenised."""
    import datamodules.tokenising

    seen = []
    original = datamodules.tokenising.encode_batch
    monkeypatch.setattr(
        datamodules.tokenising,
        "encode_batch",
        lambda t, rows, **k: seen.extend([1] * len(rows)) or original(t, rows, **k),
    )
    return seen


def test_tokenised_once(make_instruction, tmp_path, tokenisings):
    file = as_jsonl(tmp_path)
    first = ready(make_instruction(train_files=[file]))
    assert len(tokenisings) == 20
    again = ready(make_instruction(train_files=[file], batch_size=4, packing=False))
    assert len(tokenisings) == 20
    assert again.train_set == first.train_set
    assert again.tokenizer.chat_template == first.tokenizer.chat_template


@pytest.mark.parametrize("change", ["content", "max_length", "seed", "template", "heldout"])
def test_another_fingerprint_is_tokenised_anew(make_instruction, tmp_path, tokenisings, change):
    file = as_jsonl(tmp_path)
    ready(make_instruction(train_files=[file]))
    tokenisings.clear()
    kwargs = {
        "content": {},
        "max_length": {"max_length": 95},
        "seed": {"seed": 1},
        "template": {"chat_template": "{% for m in messages %}{{ m['content'] }}!{% endfor %}"},
        "heldout": {"heldout_fraction": 0.5},
    }[change]
    if change == "content":
        write_jsonl(tmp_path / "sums.jsonl", ROWS[1:])
    module = ready(make_instruction(train_files=[file], **kwargs))
    assert len(tokenisings) == (19 if change == "content" else 20)
    assert len(module.train_set) + len(module.heldout_set) == len(tokenisings)


def test_another_tokenizer_or_dataset_of_the_same_name_is_tokenised_anew(
    make_instruction, tmp_path, tokenizer_dir, tokenisings, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    folder = tmp_path / "my_dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)

    def module():
        made = make_instruction(dataset=str(folder))
        made.tokenizer_source = str(tmp_path / "tokenizer")
        return ready(made)

    module()
    module()
    assert len(tokenisings) == 20
    write_jsonl(folder / "train.jsonl", ROWS[:15])
    assert len(module().train_set) == 14
    assert len(tokenisings) == 35
    (tmp_path / "tokenizer/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    assert texts(module())[0].endswith("!")
    assert len(tokenisings) == 50


def test_a_changed_template_file_is_tokenised_anew(make_instruction, tmp_path, tokenisings):
    file, template = as_jsonl(tmp_path), tmp_path / "t.jinja"
    for mark in "?!":
        template.write_text("{% for m in messages %}{{ m['content'] }}" + mark + "{% endfor %}")
        module = ready(make_instruction(train_files=[file], chat_template=str(template)))
        assert texts(module)[0].endswith(mark)


def test_two_fits_started_together_share_what_the_first_prepared(make_instruction, tmp_path, monkeypatch, tokenisings):
    file = as_jsonl(tmp_path)
    slow, quick = make_instruction(train_files=[file]), make_instruction(train_files=[file])
    original, other = slow._tokenise, Thread(target=quick.prepare_data)

    def overtaken(*args):
        other.start()
        other.join(0.3)
        assert other.is_alive(), "it waits"
        original(*args)

    monkeypatch.setattr(slow, "_tokenise", overtaken)
    slow.prepare_data()
    other.join()
    assert len(tokenisings) == 20
    assert texts(ready(slow)) == texts(ready(quick))
    assert list((tmp_path / "cache").iterdir()) == [slow.folder], "nothing else is left"


def test_what_a_killed_process_left_is_removed(make_instruction, tmp_path):
    left = tmp_path / "cache/unfinished.0123/data"
    left.mkdir(parents=True)
    (left / "examples.arrow").write_text("half")
    module = ready(make_instruction(train_files=[as_jsonl(tmp_path)]))
    assert list((tmp_path / "cache").iterdir()) == [module.folder]


@pytest.mark.parametrize("damage", ["cut short", "other bytes", "missing", "no contents"])
def test_a_damaged_entry_is_made_anew(make_instruction, tmp_path, tokenisings, damage):
    file = as_jsonl(tmp_path)
    whole = ready(make_instruction(train_files=[file]))
    examples = list(whole.train_set)
    table = whole.folder / "examples.arrow"
    if damage == "missing":
        table.unlink()
    elif damage == "no contents":
        (whole.folder / "contents.json").write_text("[")
    else:
        content = table.read_bytes()
        table.unlink()  # the first module still reads it
        table.write_bytes(content[:-9] if damage == "cut short" else content[:900] + b"????????" + content[908:])
    assert list(ready(make_instruction(train_files=[file])).train_set) == examples
    assert len(tokenisings) == 40
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_can_only_be_read_serves(make_instruction, tmp_path, tokenisings, monkeypatch):
    file = as_jsonl(tmp_path)
    ready(make_instruction(train_files=[file]))

    def refuse(*_, **__):
        raise PermissionError("read-only")

    for name in ("mkdir", "rename", "replace", "unlink", "touch"):  # the tests may run as root, whom no mode stops
        monkeypatch.setattr(f"pathlib.Path.{name}", refuse)
    module = ready(make_instruction(train_files=[file], packing=False))
    assert len(list(module.train_dataloader())) == 10
    assert len(tokenisings) == 20


def test_a_file_written_to_while_it_is_read_is_not_cached(make_instruction, tmp_path, monkeypatch):
    file = as_jsonl(tmp_path)
    module = make_instruction(train_files=[file])
    original = module._tokenise

    def rewritten(*args):
        original(*args)
        write_jsonl(tmp_path / "sums.jsonl", ROWS[5:])

    monkeypatch.setattr(module, "_tokenise", rewritten)
    with pytest.raises(ValueError, match="written to while it was read"):
        module.prepare_data()
    assert list((tmp_path / "cache").iterdir()) == []
    assert texts(ready(make_instruction(train_files=[file]))) == rendered(module_of(file, make_instruction), ROWS[5:])


def module_of(file, make_instruction):
    return ready(make_instruction(train_files=[file]))


def test_every_file_is_read_once_for_its_name_in_the_cache(make_instruction, tmp_path, monkeypatch):
    file, opened = as_jsonl(tmp_path), []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda s, *a: opened.append(s.name) or original(s, *a))
    ready(make_instruction(train_files=[file], heldout_fraction=0.2))
    ready(make_instruction(train_files=[file], heldout_fraction=0.2, packing=False))
    assert len([name for name in opened if str(name) == file]) == 1


def test_a_crash_while_tokenising_leaves_no_half_cache(make_instruction, tmp_path, monkeypatch):
    import datamodules.tokenising

    file = as_jsonl(tmp_path)
    calls = []
    original = datamodules.tokenising.encode_batch

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(datamodules.tokenising, "encode_batch", crash)
        patch.setattr(datamodules.tokenising, "CHUNK_ROWS", 4)
        with pytest.raises(KeyboardInterrupt):
            make_instruction(train_files=[file]).prepare_data()
    module = ready(make_instruction(train_files=[file]))
    assert texts(module) == rendered(module, ROWS)


@pytest.mark.parametrize(("write", "count"), [(as_jsonl, 20), (as_json, None), (as_parquet, 20)])
def test_how_many_rows_a_stream_will_give(make_instruction, tmp_path, write, count):
    module = make_instruction(train_files=[write(tmp_path)])
    assert module.count_rows("train") == count
    assert module.count_rows("heldout") is None


def test_a_tokenizer_is_known_by_its_content(make_instruction, tmp_path, tokenizer_dir, tokenisings):
    """Not by the time of its files, nor by the weights of a model beside it."""
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    for change in range(2):
        module = make_instruction(train_files=[as_jsonl(tmp_path)])
        module.tokenizer_source = str(tmp_path / "tokenizer")
        module.prepare_data()
        (tmp_path / "tokenizer/model.safetensors").write_text(f"{change}")
        (tmp_path / "tokenizer/tokenizer.json").touch()
    assert len(tokenisings) == 20


# --- bad input ----------------------------------------------------------------------------------------


def test_a_broken_line_is_named_by_file_and_number(make_instruction, tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n\n" + '{"messages": [}\n' + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(ValueError, match=r"sums\.jsonl:3: broken JSON line"):
        make_instruction(train_files=[str(file)]).prepare_data()
    broken = tmp_path / "sums.json"
    broken.write_text(f"[\n{json.dumps(ROWS[0])},\n{{oops}}\n]")
    with pytest.raises(ValueError, match=r"sums\.json:3: broken JSON"):
        make_instruction(train_files=[str(broken)]).prepare_data()


def test_missing_empty_and_unknown_files_are_named(make_instruction, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.train_files: .*nowhere\.jsonl does not exist"):
        make_instruction(train_files=[str(tmp_path / "nowhere.jsonl")]).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"data.heldout_files: .*nowhere\.jsonl does not exist"):
        make_instruction(
            train_files=[as_jsonl(tmp_path)], heldout_files=[str(tmp_path / "nowhere.jsonl")]
        ).prepare_data()
    with pytest.raises(
        FileNotFoundError, match=r"data.chat_template='nowhere.jinja' is neither Jinja text nor a file"
    ):
        make_instruction(train_files=[as_jsonl(tmp_path)], chat_template="nowhere.jinja")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        make_instruction(train_files=[str(tmp_path / "empty.jsonl")]).prepare_data()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"blank\.jsonl holds no examples"):
        make_instruction(train_files=[str(tmp_path / "blank.jsonl")]).prepare_data()
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"table\.csv has an unsupported file type, expected \.jsonl"):
        make_instruction(train_files=[str(tmp_path / "table.csv")]).prepare_data()
    with pytest.raises(ValueError, match=r"^data\.heldout_files: .*table\.csv has an unsupported"):
        make_instruction(train_files=[as_jsonl(tmp_path)], heldout_files=[str(tmp_path / "table.csv")]).prepare_data()


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "Hi",
        {"role": "user", "content": "Hi"},
        [{"role": "user"}],
        ["Hi"],
    ],
)
def test_messages_of_another_shape_are_named(make_instruction, tmp_path, messages):
    file = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"messages": messages}])
    with pytest.raises(ValueError, match=r"rows\.jsonl: example 2: messages must be a list of \{role, content\}"):
        make_instruction(train_files=[file]).prepare_data()


def test_prompts_and_responses_that_are_no_text_are_named(make_instruction, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"q": "2 + 2?", "a": 4}])
    with pytest.raises(ValueError, match=r"rows\.jsonl: example 1: content must be text; got 4"):
        make_instruction(train_files=[file], prompt_column="q", response_column="a").prepare_data()


@pytest.mark.parametrize("content", ["5", '["Hi"]', "[[1]]"])
def test_examples_that_are_no_objects_are_named(make_instruction, tmp_path, content):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=r"rows\.json: example 1: not an object of columns"):
        make_instruction(train_files=[str(tmp_path / "rows.json")]).prepare_data()


@pytest.mark.parametrize(
    ("kwargs", "column"),
    [
        ({}, "messages"),
        ({"prompt_column": "question", "response_column": "answer"}, "answer"),
        ({"prompt_column": "question", "response_column": "reply", "domain_column": "subject"}, "subject"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(make_instruction, tmp_path, kwargs, column):
    file = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(ValueError, match=rf"pairs\.jsonl has no column '{column}'.*'question', 'reply', 'topic'"):
        make_instruction(train_files=[file], **kwargs).prepare_data()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "one of data.train_files and data.dataset"),
        ({"train_files": ["a.jsonl"], "dataset": "b"}, "one of data.train_files and data.dataset"),
        ({"train_files": ["a.jsonl"], "prompt_column": "p"}, "go together"),
        ({"train_files": ["a.jsonl"], "heldout_fraction": 1.0}, "heldout_fraction=1.0"),
        ({"train_files": ["a.jsonl"], "max_length": 0}, "max_length=0"),
        ({"train_files": ["a.jsonl"], "batch_size": 0}, "batch_size=0"),
        ({"train_files": ["a.jsonl"], "eval_batch_tokens": 0}, "data.eval_batch_tokens=0 must be at least 1"),
        ({"train_files": ["a.jsonl"], "num_workers": -1}, "data.num_workers=-1 must be at least 0"),
        ({"train_files": []}, r"data\.train_files=\[\]"),
        ({"train_files": ["a.jsonl"], "heldout_files": []}, r"data\.heldout_files=\[\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(make_instruction, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_instruction(**kwargs)


def test_a_cache_that_cannot_be_written_is_named(make_instruction, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"data\.cache_dir='.*a\.jsonl/cache' can't be written"):
        make_instruction(train_files=[file], cache_dir=f"{file}/cache").prepare_data()


def test_a_broken_template_is_named_with_its_line(make_instruction, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    for template, message in (("\n{% for", r"\(line 2\): unexpected"), ("{{ messages[7].x }}", "no element 7")):
        with pytest.raises(ValueError, match=rf"template can't be rendered.*{message}.*data\.chat_template"):
            make_instruction(train_files=[file], chat_template=template).prepare_data()


def test_a_broken_parquet_file_is_named(make_instruction, tmp_path):
    (tmp_path / "a.parquet").write_text("nothing")
    with pytest.raises(ValueError, match=r"data\.train_files: .*a\.parquet is not a valid parquet file"):
        make_instruction(train_files=[str(tmp_path / "a.parquet")]).prepare_data()


def test_nothing_left_to_train_on_is_refused(make_instruction, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    with pytest.raises(ValueError, match="two different conversations"):
        make_instruction(train_files=[file]).prepare_data()


def test_the_default_verifier_ignores_white_space_alone(make_instruction):
    module = make_instruction(train_files=["a.jsonl"])
    assert module.verify({"answer": "4 2"}, "  4  2\n")
    assert not module.verify({"answer": "4 2"}, "42")


def test_a_dataset_of_the_hub_by_name_configuration_and_revision(make_instruction, monkeypatch):
    asked = {}

    def load(name, configuration, **kwargs):
        asked.update(name=name, configuration=configuration, **kwargs)
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datamodules.instruction.load_dataset", load)
    settings = {"dataset": "org/sums", "configuration": "easy", "revision": "abc123", "split": "train[:20]"}
    module = ready(make_instruction(**settings))
    assert asked == {"name": "org/sums", "configuration": "easy", "revision": "abc123", "split": "train[:20]"}
    assert module.domains == ["sums"]
    keys = {
        make_instruction(**{**settings, **other}).folder
        for other in ({}, {"configuration": "hard"}, {"revision": "d"})
    }
    assert len(keys) == 3


def test_a_dataset_that_cannot_be_loaded_is_named(make_instruction, monkeypatch):
    def load(*args, **kwargs):
        raise ValueError("Unknown split 'tests'")

    monkeypatch.setattr("datamodules.instruction.load_dataset", load)
    with pytest.raises(ValueError, match=r"data\.dataset='org/sums' can't be loaded: Unknown split 'tests'"):
        make_instruction(dataset="org/sums").prepare_data()
