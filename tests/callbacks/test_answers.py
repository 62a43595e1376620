"""The answers of one and of several processes: one file, in order, each prompt once."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from callbacks import WriteAnswers, answers


@pytest.mark.parametrize(("count", "world"), [(5, 1), (5, 2), (8, 2), (3, 4), (17, 3)])
def test_answers_stand_in_the_order_of_the_prompts(tmp_path, monkeypatch, count, world):
    """Ranks played in turn: each hands in its share of a batch as the sampler deals it."""
    samplers = [DistributedSampler(range(count), world, rank, shuffle=False) for rank in range(world)]
    shares = [[list(sampler)[i : i + 2] for i in range(0, len(sampler), 2)] for sampler in samplers]
    writer, trainer = WriteAnswers(), SimpleNamespace(default_root_dir=tmp_path / "run")
    writer.on_predict_start(trainer, None)
    for number, own in enumerate(shares[0]):
        parts = [{index: {"prompt": index} for index in share[number]} for share in shares]
        monkeypatch.setattr(answers, "gathered", lambda mine, parts=parts: [mine, *parts[1:]])
        batch = {"index": torch.tensor(own)}
        writer.write_on_batch_end(trainer, None, list(parts[0].values()), None, batch, number, 0)
    lines = (tmp_path / "run/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == list(range(count))
