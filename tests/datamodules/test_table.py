"""Examples in an Arrow file: read as a list of dicts, without holding them; written without keeping them."""

import pickle

import numpy as np
import psutil
import pyarrow as pa
import pytest

from datamodules.table import SCHEMA, Examples, TableWriter
from upit.core.batches import collate, domains_of, lengths_of


def batch(start: int, count: int, tokens: int) -> pa.RecordBatch:
    rows = [
        {
            "id": f"r:{i}", "domain": "ab"[i % 2], "input_ids": list(range(i, i + tokens)), "prompt_length": 1,
            "labels": [-100, *range(i + 1, i + tokens)], "answer": "a", "metadata": "", "cut": False, "merged": False,
            "conversation": i, "further": False,
        }
        for i in range(start, start + count)
    ]  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


@pytest.fixture
def table(tmp_path):
    writer = TableWriter(tmp_path / "data")
    for start in range(0, 30, 10):
        writer.write(batch(start, 10, 5 + start), heldout=start == 20)
    return tmp_path / "data", writer.close(), list(writer.domain_names)


def test_a_choice_of_examples_is_like_a_list_of_dicts(table):
    folder, columns, names = table
    assert columns["heldout"].tolist() == [False] * 20 + [True] * 10
    about = {"lengths": columns["lengths"], "domain_ids": columns["domains"], "domain_names": names}
    chosen = np.array([3, 17, 29, 3])
    examples = Examples(folder, chosen, **about)
    rows = [row for start in range(0, 30, 10) for row in batch(start, 10, 5 + start).to_pylist()]
    kept = [{name: rows[i][name] for name in examples[0]} for i in chosen]
    assert list(examples) == kept
    assert examples == kept
    assert examples != kept[:3]
    assert (examples[-1], examples[1:3], examples + kept) == (kept[-1], kept[1:3], kept + kept)
    with pytest.raises(IndexError):
        examples[4]
    assert lengths_of(examples) == [5, 15, 25, 5] == lengths_of(kept)
    assert domains_of(examples, ["b", "a"]).tolist() == domains_of(kept, ["b", "a"]).tolist() == [0, 0, 0, 0]
    ours, theirs = (collate([[0, 1], [2]], data, pad_id=0) for data in (examples, kept))
    assert all((ours[name] == theirs[name]).all() for name in ("input_ids", "labels", "example_ids", "lengths"))
    assert pickle.loads(pickle.dumps(examples)) == examples
    assert list(examples.choose(np.array([2, 0]))) == [kept[2], kept[0]]


def test_what_is_written_and_read_is_not_kept_in_memory(tmp_path):
    """A hundred batches of 1.6 MB each, of which 20 bytes an example stay."""
    writer, content = TableWriter(tmp_path / "data"), batch(0, 200, 1000).serialize().to_pybytes()
    before = psutil.Process().memory_full_info().uss
    for _ in range(100):
        writer.write(pa.ipc.read_record_batch(pa.py_buffer(bytes(bytearray(content))), SCHEMA), heldout=False)
    columns = writer.close()
    assert psutil.Process().memory_full_info().uss - before < 50e6
    assert len(columns["lengths"]) == 20_000
    assert (tmp_path / "data/examples.arrow").stat().st_size > 150e6
