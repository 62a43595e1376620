"""Gradient accumulation against a naive loop over the examples of each optimizer step."""

import copy
import shutil

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from datamodules import ReasoningGymDataModule
from lightning_modules import DenseModule, MoEModule
from lightning_modules.accumulation import TokenWindow
from tests.conftest import FAMILIES, TINY, make_callbacks, make_module, make_trainer, tiny_data
from tests.lightning_modules.test_optimizers import Fused
from upit.core.batches import IGNORE, collate
from upit.model.families import moe_config
from upit.model.loading.build import build, scratch_config
from upit.model.losses import load_balancing_loss
from upit.model.routers import last_routing

EXAMPLES = 8
BALANCE = 0.5


class Chunks(ReasoningGymDataModule):
    """The first examples in their order, a fixed number a micro-batch and process; no label in those named empty."""

    def __init__(self, cache, rows: int, empty=()) -> None:
        settings = {"train_size": 120, "heldout_size": 8, "vocab_size": 320, "max_length": 128, "batch_size": 4}
        super().__init__(families=FAMILIES, cache_dir=str(cache), **settings)
        self.rows_each, self.empty = rows, empty

    def examples(self) -> list[dict]:
        """Answers of very different lengths: question and answer of every second example are learned."""
        chosen = copy.deepcopy(self.train_set[:EXAMPLES])
        for number, example in enumerate(chosen):
            if number % 2:
                example["labels"] = [IGNORE, *example["input_ids"][1:]]
            if number in self.empty:
                example["labels"] = [IGNORE] * len(example["labels"])
        return chosen

    def train_dataloader(self) -> DataLoader:
        world, rank = self._world
        each = self.rows_each * world
        groups = [list(range(start, start + each))[rank::world] for start in range(0, EXAMPLES, each)]
        rows = self.examples()
        pad_id = self.tokenizer.pad_token_id
        return DataLoader(
            groups, batch_size=None, collate_fn=lambda group: collate([[i] for i in group], rows, pad_id=pad_id)
        )


class Gradients(L.Callback):
    """What another callback sees before each optimizer step; kept in a file for fits of several processes."""

    def __init__(self, file=None) -> None:
        self.seen, self.file = [], file

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.seen.append(torch.cat([param.grad.flatten() for param in module.parameters()]))

    def on_train_end(self, trainer, pl_module) -> None:
        if self.file is not None:
            torch.save(torch.stack(self.seen), f"{self.file}{trainer.global_rank}.pt")


def fit(cache, run, *, rows, accumulate, module=None, empty=(), callbacks=(), **trainer):
    """Gradients of each optimizer step, the module, the trainer."""
    torch.manual_seed(0)
    module = module or DenseModule(config=TINY, lr=0.0)
    data, grads = Chunks(cache, rows, empty), Gradients()
    settings = {
        "max_epochs": 1,
        "max_steps": -1,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = make_trainer(run, [grads, *callbacks], accumulate_grad_batches=accumulate, **{**settings, **trainer})
    trainer.fit(module, datamodule=data)
    return grads.seen, module, trainer


def naive(module, data, chosen) -> torch.Tensor:
    """Gradient of the mean loss of all response tokens, example by example, with stock logits."""
    model = copy.deepcopy(module.lm).train()
    rows, tokens = data.examples(), 0
    model.zero_grad()
    for i in chosen:
        ids, labels = (torch.tensor([rows[i][field]]) for field in ("input_ids", "labels"))
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORE, reduction="sum").backward()
        tokens += int((labels[0, 1:] != IGNORE).sum())
    return torch.cat([param.grad.flatten() for param in model.parameters()]) / tokens


@pytest.mark.parametrize(
    ("rows", "accumulate", "limit", "empty", "windows"),
    [
        (8, 1, 1.0, (), [range(8)]),
        (1, 8, 1.0, (), [range(8)]),
        (2, 4, 1.0, (), [range(8)]),
        (1, 5, 1.0, (), [range(5), range(5, 8)]),
        (1, 3, 7, (), [range(3), range(3, 6), range(6, 7)]),
        (1, 4, 1.0, (0, 3, 4), [range(4), range(4, 8)]),
    ],
)
def test_gradients_are_those_of_all_tokens_of_the_step(cache, tmp_path, rows, accumulate, limit, empty, windows):
    found, module, trainer = fit(
        cache, tmp_path, rows=rows, accumulate=accumulate, empty=empty, limit_train_batches=limit
    )
    expected = [naive(module, trainer.datamodule, window) for window in windows]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("counts", [[1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0, 2.0], [3.0, 1.0]])
def test_few_tokens_count_whole(counts):
    """The loss of a micro-batch is its number here, so the gradient is their mean weighted by tokens."""
    weight, window = torch.nn.Linear(1, 1, bias=False), TokenWindow()
    for i, count in enumerate(counts):
        window.add(torch.tensor(count), first=i == 0)
        (weight.weight.sum() * (i + 1) * window.weight / len(counts)).backward()
    window.scale(weight, divided_by=len(counts))
    expected = sum((i + 1) * count for i, count in enumerate(counts)) / sum(counts)
    torch.testing.assert_close(weight.weight.grad, torch.full((1, 1), expected))


def test_a_window_without_a_response_token_has_no_gradient(cache, tmp_path):
    (first, second), _, _ = fit(cache, tmp_path, rows=1, accumulate=4, empty=range(4))
    assert not first.any()
    assert second.isfinite().all()
    assert second.any()


@pytest.mark.parametrize("kind", [DenseModule, Fused])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_step_ends_where_that_of_one_large_batch_does(cache, tmp_path, kind, clip):
    ends = []
    for rows, accumulate in ((8, 1), (1, 8)):
        module = kind(config=TINY, lr=1e-2, schedule="constant_with_warmup", warmup_fraction=0.0)
        fit(cache, tmp_path, rows=rows, accumulate=accumulate, module=module, max_epochs=3, gradient_clip_val=clip)
        ends.append(module.state_dict())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=2e-5)


def moe_from(folder, data) -> str:
    """A small MoE on disk."""
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    config = moe_config(scratch_config(TINY, data.tokenizer), num_experts=4, top_k=2)
    build(config).save_pretrained(folder)
    return str(folder)


def test_the_balance_loss_of_each_micro_batch_counts_by_its_response_tokens(cache, tmp_path):
    source = moe_from(tmp_path / "moe", Chunks(cache, 1))
    module = MoEModule(model=source, lr=0.0, load_balancing_weight=BALANCE)
    found, module, trainer = fit(cache, tmp_path, rows=2, accumulate=3, module=module)
    batches, model = list(trainer.datamodule.train_dataloader()), module.lm.train()
    for ours, window in zip(found, [batches[:3], batches[3:]], strict=True):
        model.zero_grad()
        counts = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in window]
        for batch, count in zip(window, counts, strict=True):
            loss = module.lm_loss(batch)[0]
            logits_DTE, expert_ids_DTK = last_routing(model)
            mask_T = (batch["example_ids"] >= 0).flatten()
            balance = load_balancing_loss(router_logits_DTE=logits_DTE, expert_ids_DTK=expert_ids_DTK, mask_T=mask_T)
            ((loss + BALANCE * balance) * count / sum(counts)).backward()
        theirs = torch.cat([param.grad.flatten() for param in model.parameters()])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


def test_the_logged_loss_is_the_mean_of_the_tokens_of_the_step(cache, tmp_path):
    _, _, large = fit(cache, tmp_path, rows=8, accumulate=1)
    _, _, small = fit(cache, tmp_path, rows=1, accumulate=8)
    assert small.callback_metrics["train/loss"] == pytest.approx(float(large.callback_metrics["train/loss"]), rel=1e-5)
    _, _, none = fit(cache, tmp_path, rows=1, accumulate=4, empty=range(4), limit_train_batches=4)
    assert "train/loss" not in none.callback_metrics


@pytest.mark.usefixtures("own_port")
def test_two_processes_give_the_gradients_of_one(cache, tmp_path):
    """DDP, each rank with its own uneven share, a short last window, and a micro-batch of one rank without a token."""
    empty = (2,)
    data = Chunks(cache, 1, empty)
    data.prepare_data()  # before the fork
    torch.manual_seed(0)
    module = DenseModule(config=TINY, lr=0.0)
    trainer = make_trainer(
        tmp_path,
        [Gradients(tmp_path / "rank")],
        accumulate_grad_batches=3,
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
        max_epochs=1,
        max_steps=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data)
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    _, single, one = fit(cache, tmp_path, rows=8, accumulate=1, empty=empty)
    for window, grads in zip([range(6), range(6, 8)], zip(*found, strict=True), strict=True):
        theirs = naive(single, one.datamodule, window)
        for ours in grads:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


class SaveAt(L.Callback):
    """Checkpoints at the end of batches, counted from the start of the fit."""

    def __init__(self, run, batches) -> None:
        self.run, self.batches, self.done = run, batches, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.done += 1
        if self.done in self.batches:
            trainer.save_checkpoint(self.run / f"checkpoints/{self.done}.ckpt")


def resumed(cache, run, checkpoint, **trainer):
    """The weights at the end of a fit that goes on in a copy of ``run``."""
    copied = run.with_name(f"{run.name}-{checkpoint}")
    shutil.copytree(run, copied)
    module = make_module()
    trainer = make_trainer(copied, make_callbacks(report=False), logger=False, **trainer)
    path = str(copied / f"checkpoints/{checkpoint}.ckpt")
    trainer.fit(module, datamodule=tiny_data(cache), ckpt_path=path, weights_only=True)
    return module.lm.state_dict()


def test_a_checkpoint_within_a_window_goes_on_from_its_beginning(cache, tmp_path):
    run, settings = tmp_path / "run", {"accumulate_grad_batches": 3, "max_steps": 8}
    module = make_module()
    saved = [5, 20, 21]  # within a window of the dense phase, of the MoE's, and between two
    trainer = make_trainer(run, [*make_callbacks(report=False), SaveAt(run, saved)], logger=False, **settings)
    trainer.fit(module, datamodule=tiny_data(cache))
    assert module.phase == "moe"
    for checkpoint in saved:
        end = resumed(cache, run, checkpoint, **settings)
        assert all(torch.equal(end[name], tensor) for name, tensor in module.lm.state_dict().items()), checkpoint
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches=2 \(checkpoint: 3\)"):
        resumed(cache, run.rename(tmp_path / "again"), 5, **settings | {"accumulate_grad_batches": 2})
