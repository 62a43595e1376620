"""Tokenise a stream of conversations on all cores, in order; the result does not depend on their number."""

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from datamodules.chat import encode_batch
from datamodules.table import SCHEMA

CHUNK_ROWS = 256  # tokenised in one call
ALONE_SECONDS = 1.0  # small data is done in this process, before others have started; ours
WAITING = 2  # chunks of each process that wait for it or behind it


class Chunk(NamedTuple):
    """Examples of some conversations, and the reasons of those that give none."""

    batch: pa.RecordBatch
    rows: int
    dropped: list[tuple[str, str]]  # reason, id


def tokenised(
    tokenizer,
    rows: Iterable[dict[str, Any]],
    *,
    max_length: int,
    invalid: str = "refuse",
    processes: int | None = None,
) -> Iterator[Chunk]:
    """Examples of all rows, in their order, a chunk at a time.

    Args:
        processes: default one a core that this process may use.
    Raises: ValueError: see :func:`datamodules.chat.encode_batch`.
    """
    processes = processes or len(os.sched_getaffinity(0))
    stream = iter(rows)
    chunks = iter(lambda: list(islice(stream, CHUNK_ROWS)), [])
    started = time.monotonic()
    for chunk in chunks:
        yield _read(_encode(tokenizer, chunk, max_length, invalid))
        if processes > 1 and time.monotonic() - started > ALONE_SECONDS:
            break
    # forked: the tokenizer is shared as it is, and no script is run a second time
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start,
        initargs=(tokenizer, max_length, invalid, os.getpid()),
    )
    waiting: deque[Future] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_here, chunk))
            if len(waiting) > WAITING * processes:
                yield _read(waiting.popleft().result())
        while waiting:
            yield _read(waiting.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)


_settings: tuple[Any, int, str]


def _start(tokenizer, max_length: int, invalid: str, parent: int) -> None:
    global _settings
    _settings = tokenizer, max_length, invalid
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode_here(rows: Sequence[dict[str, Any]]) -> tuple[bytes, int, list[tuple[str, str]]]:
    tokenizer, max_length, invalid = _settings
    return _encode(tokenizer, rows, max_length, invalid)


def _encode(
    tokenizer, rows: Sequence[dict[str, Any]], max_length: int, invalid: str
) -> tuple[bytes, int, list[tuple[str, str]]]:
    examples = encode_batch(tokenizer, rows, max_length=max_length, invalid=invalid)
    dropped = [(example["reason"], example["id"]) for example in examples if example["reason"]]
    kept = [
        {**example, "conversation": digest, "further": further, "merged": bool(example["merged"])}
        for example, (digest, further) in zip(examples, _origins(rows, examples), strict=True)
        if not example["reason"]
    ]
    columns = [pa.array([example[field.name] for example in kept], field.type) for field in SCHEMA]
    batch = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
    return batch.serialize().to_pybytes(), len(rows), dropped


def _read(result: tuple[bytes, int, list[tuple[str, str]]]) -> Chunk:
    content, rows, dropped = result
    return Chunk(pa.ipc.read_record_batch(pa.py_buffer(content), SCHEMA), rows, dropped)


def _origins(rows: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> Iterator[tuple[int, bool]]:
    """Digest of each example's conversation, and whether the example before it is of the same row.

    A row's examples stand together, and their ids begin with its id.
    """
    place, before = -1, -1
    for example in examples:
        while place < 0 or not (f"{example['id']}#").startswith(f"{rows[place]['id']}#"):
            place += 1
        yield conversation_digest(rows[place]), place == before
        before = place


def conversation_digest(row: dict[str, Any]) -> int:
    """The same for conversations of the same messages and tools, a signed 64-bit number."""
    content = json.dumps([row["messages"], row.get("tools")], sort_keys=True, default=str)
    return int.from_bytes(
        hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest(), signed=True
    )
