"""The place that a checkpoint's training goes on from: the end of its last optimizer step.

Lightning's loops save their counters as they stand in the hook that saves. Restoring some of these skips an epoch or a
validation, or trains a batch twice (seen with lightning 2.6.6): at an epoch's last batch, with ``max_steps`` at an
epoch's end, within an accumulation window or a validation. :func:`settle` rewrites them to places that Lightning
restores exactly: a number of whole optimizer steps into an epoch, or the beginning of one.
"""

from typing import Any

import lightning as L

Counts = dict[str, int]
BATCH, VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"
OPTIMIZER, SCHEDULER = "epoch_loop.automatic_optimization.optim_progress", "epoch_loop.scheduler_progress"


def settle(loop: dict[str, Any], trainer: L.Trainer) -> None:
    """Rewrite the fit loop's state in a checkpoint, in place.

    A validation that was due after the last step and had not finished runs again from its beginning. Micro-batches of
    an unfinished accumulation window, whose gradients no checkpoint holds, are trained again.
    """
    batches = trainer.num_training_batches
    epoch, batch, validation = loop["epoch_progress"]["current"], loop[BATCH], loop[VALIDATION]
    processed = batch["current"]["processed"]
    whole = processed >= batches
    done = processed if whole else processed - processed % trainer.accumulate_grad_batches
    running = epoch["processed"]
    if epoch["started"] == running:  # no epoch is under way
        if whole:
            done = 0
        elif processed:  # max_steps or a callback stopped the last one before its end
            running -= 1
    pending = (
        done > 0 and done == processed and (batch["current"]["completed"] < done or _is_stopped(validation, trainer))
    )
    trained = batch["total"]["processed"] - (processed - done if done or not whole else 0)

    for counts in loop["epoch_progress"].values():
        _fill(counts, running)
        if done:
            counts["ready"] = counts["started"] = running + 1
    _fill(batch["current"], done)
    _fill(batch["total"], trained)
    batch["is_last_batch"] = whole and done > 0
    _settle_validation(validation, pending)
    if not done:
        for name in ("step", "zero_grad"):
            _fill(loop[OPTIMIZER]["optimizer"][name]["current"], 0)
        _fill(loop[SCHEDULER]["current"], 0)
    # Lightning counts this step when the validation after it is over
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - (pending or batch["is_last_batch"])
    loaders = loop["state_dict"].get("combined_loader", [])
    if len(loaders) == 1 and "batches_done" in loaders[0]:
        # limit_train_batches may end an epoch early: then too no batch of it is left
        left = len(trainer.train_dataloader) if batch["is_last_batch"] else done
        loaders[0].update(epoch=running, batches_done=left)


def _is_stopped(validation: dict[str, Any], trainer: L.Trainer) -> bool:
    """Whether a validation has begun and not come to its end."""
    current = validation["current"]
    begun = trainer.validating or current["ready"] > 0
    return begun and (current["completed"] < current["ready"] or not validation["is_last_batch"])


def _settle_validation(validation: dict[str, Any], pending: bool) -> None:
    """Counters of a validation that is over, or that Lightning takes for stopped in its first batch."""
    current, total = validation["current"], validation["total"]
    _fill(total, total["completed"])
    _fill(current, 0 if pending else current["completed"])
    if pending:
        validation["is_last_batch"] = False
        for counts in (current, total):
            counts["ready"] += 1
            counts["started"] += 1


def _fill(counts: Counts, value: int) -> None:
    for name in counts:
        counts[name] = value
