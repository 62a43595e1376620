"""What a whole fit compiles: each phase's layers at its start, and nothing anew later."""

import pytest
import torch
from lightning.pytorch import Callback
from torch._dynamo.utils import counters

from tests.conftest import make_callbacks, make_module, make_trainer

SWAP, END = 10, 20


class Graphs(Callback):
    """Compiled graphs up to each training step, and where the validations were."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.validated: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.counts.append(counters["stats"]["unique_graphs"])

    def on_validation_start(self, trainer, pl_module):
        self.before = counters["stats"]["unique_graphs"]

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(trainer.global_step)
        assert counters["stats"]["unique_graphs"] == self.before


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_is_compiled_again_after_a_validation(make_data, tmp_path, monkeypatch, accumulate):
    compile_layer = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compile_layer(layer, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    module, graphs = make_module(compile=True), Graphs()
    module.dense.compile_layers = True
    settings = {"val_check_interval": 3 * accumulate, "check_val_every_n_epoch": None, "max_steps": END}
    settings |= {"max_epochs": -1, "accumulate_grad_batches": accumulate, "logger": False}
    callbacks = make_callbacks({"every_n_steps": 5}, {"at_step": SWAP})
    trainer = make_trainer(tmp_path, [*callbacks, graphs], **settings)
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else such layers would run uncompiled
            trainer.fit(module, datamodule=make_data())
    finally:
        torch.compiler.set_stance("default")
    swap = SWAP * accumulate
    dense, moe = graphs.counts[:swap], graphs.counts[swap:]
    assert graphs.validated == [3, 6, 9, 12, 15, 18]
    assert 0 < dense[0] == dense[-1] < moe[0] == moe[-1]
