"""What is logged under two CPU processes: means over all their tokens, exchanged only where they are logged."""

import json
import os
import socket
from pathlib import Path
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger

from lightning_modules import DenseModule
from tests.conftest import TINY, tiny_data
from upit.evaluation.scores import domain_exact_match
from upit.report.run import Run

EVERY, STEPS = 3, 7
COLLECTIVES = ("barrier", "all_gather", "all_reduce")


class Recording(DenseModule):
    """Keeps each step's loss sum and token count of this rank, and the collectives of its training steps."""

    def training_step(self, batch, batch_idx):
        real = {name: getattr(dist, name) for name in COLLECTIVES}
        calls = dict.fromkeys(COLLECTIVES, 0)

        def counted(name):
            def call(*args, **kwargs):
                calls[name] += 1
                return real[name](*args, **kwargs)

            return call

        with patch.multiple(dist, **{name: counted(name) for name in COLLECTIVES}):
            loss = super().training_step(batch, batch_idx)
        self.collectives.append(calls)
        return loss

    def lm_loss(self, batch):
        loss, tokens = super().lm_loss(batch)
        self.seen.append((float(loss.detach() * tokens), int((batch["labels"] != -100).sum())))
        return loss, tokens


def be_rank(rank: int, port: int, folder: str, cache: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    run(folder, cache, devices=2, strategy="ddp")


def run(folder: str, cache: str, **strategy) -> None:
    L.seed_everything(0)
    module = Recording(config=TINY, lr=1e-3)
    module.seen, module.collectives = [], []
    data = tiny_data(Path(cache), heldout_size=9, eval_batch_tokens=300)
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", max_steps=STEPS, log_every_n_steps=EVERY,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        logger=CSVLogger(folder, name="", version=""),
        num_sanity_val_steps=0, **strategy,
    )  # fmt: skip
    scores = trainer.validate(module, datamodule=data, verbose=False)[0]
    trainer.fit(module, datamodule=data)
    data.verify = lambda row, _: sum(row["input_ids"]) % 3 == 0  # some of each domain, whatever the answers
    right = domain_exact_match(module.lm, data, max_new_tokens=2)
    found = {"scores": scores, "seen": module.seen, "collectives": module.collectives, "right": right}
    Path(folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(be_rank, (port, str(folder), str(cache)), nprocs=2)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_the_training_loss_is_the_mean_over_all_tokens_since_the_last_logged_step(two):
    folder, ranks = two
    sums, tokens = (torch.tensor([[pair[i] for pair in rank["seen"]] for rank in ranks]) for i in (0, 1))
    assert (tokens[0] != tokens[1]).any(), "the ranks' token counts must differ for this to say anything"
    steps, values = Run(folder).curves["train/loss"]
    assert steps == [EVERY - 1, 2 * EVERY - 1]
    windows = [slice(0, EVERY), slice(EVERY, 2 * EVERY)]
    assert values == pytest.approx([float(sums[:, w].sum() / tokens[:, w].sum()) for w in windows], rel=1e-5)


@pytest.mark.slow
def test_ranks_exchange_metrics_at_logged_steps_only(two):
    """One ``all_reduce`` a step is the loss's own: the count of all the ranks' tokens."""
    for rank in two[1]:
        quiet = {"barrier": 0, "all_gather": 0, "all_reduce": 1}
        logged = [i for i, calls in enumerate(rank["collectives"]) if calls != quiet]
        assert logged == [EVERY - 1, 2 * EVERY - 1]
        assert all(rank["collectives"][i]["barrier"] == 1 for i in logged), "one exchange for all the terms"


@pytest.mark.slow
def test_held_out_scores_equal_those_of_one_process(two, tmp_path, cache):
    run(str(tmp_path), str(cache), devices=1)
    one = json.loads((tmp_path / "rank0.json").read_text())
    assert set(one["scores"]) == {"val/loss", "val/loss/letters", "val/loss/arithmetic", "dense/val_loss"}
    assert all(0 < right < 1 for right in one["right"].values())
    for rank in two[1]:
        assert rank["scores"] == pytest.approx(one["scores"], rel=1e-6)
        assert rank["right"] == pytest.approx(one["right"])
