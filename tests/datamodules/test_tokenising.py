"""Tokenising in several processes: the same examples in the same order, errors named, nothing left after a kill."""

import os
import signal
import subprocess
import sys
import time

import pytest

from datamodules import tokenising
from datamodules.tokenising import tokenised
from tests.datamodules.conftest import turns


def rows(count):
    for i in range(count):
        yield {
            "id": f"r:{i}",
            "domain": "d",
            "messages": turns(f"What is {i}?", f"{i} " * (i % 7 + 1)),
            "metadata": "",
        }


@pytest.mark.parametrize("processes", [2, 3])
def test_examples_do_not_depend_on_the_number_of_processes(tokenizer, monkeypatch, processes):
    monkeypatch.setattr(tokenising, "CHUNK_ROWS", 8)
    monkeypatch.setattr(tokenising, "ALONE_SECONDS", 0.0)
    one = [chunk.batch.to_pylist() for chunk in tokenised(tokenizer, rows(100), max_length=20, processes=1)]
    several = [
        chunk.batch.to_pylist() for chunk in tokenised(tokenizer, rows(100), max_length=20, processes=processes)
    ]
    assert several == one
    assert len(one) == 13


def test_an_error_in_a_process_names_the_row(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenising, "CHUNK_ROWS", 8)
    monkeypatch.setattr(tokenising, "ALONE_SECONDS", 0.0)
    tokenizer.chat_template += "{{ raise_exception('no 77') if '77' in messages[0]['content'] }}"
    with pytest.raises(ValueError, match="r:77: the chat template refuses the conversation: no 77"):
        list(tokenised(tokenizer, rows(100), max_length=20, processes=2))


def test_no_row_is_read_far_ahead(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenising, "CHUNK_ROWS", 4)
    monkeypatch.setattr(tokenising, "ALONE_SECONDS", 0.0)
    read = []
    stream = tokenised(tokenizer, (read.append(1) or row for row in rows(400)), max_length=20, processes=2)
    for _ in range(3):
        next(stream)
    assert len(read) < 60
    stream.close()


SCRIPT = """
import os, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from datamodules import tokenising
from tests.datamodules.test_tokenising import rows
tokenising.ALONE_SECONDS, tokenising.CHUNK_ROWS = 0.0, 4
stream = tokenising.tokenised(AutoTokenizer.from_pretrained(sys.argv[1]), rows(10**6), max_length=20, processes=2)
for number, _ in enumerate(stream):
    if number == 10:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        print(children, flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
def test_a_killed_fit_leaves_no_process(tokenizer_dir):
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tokenizer_dir)], stdout=subprocess.PIPE, text=True)
    children = list(map(int, run.stdout.readline().split()))
    assert len(children) >= 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{child}") for child in children)
