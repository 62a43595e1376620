"""A whole fit whose training steps go through the graphs' memory, beside one that does not."""

import pytest
import torch

from lightning_modules.base import CausalLMModule
from tests.conftest import make_callbacks, make_module, make_trainer
from tests.upit.model.test_cuda_graphs import HeldGraphs
from upit.model.cuda_graphs import GraphedBody

plain_finish = CausalLMModule.finish


class Counted(HeldGraphs):
    replays = 0

    def forward(self, inputs):
        Counted.replays += 1
        super().forward(inputs)


def graphed_finish(self, trainer, model):
    plain_finish(self, trainer, model)
    self.body = GraphedBody()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_through_graphs_ends_where_it_would(make_data, tmp_path, monkeypatch, accumulate):
    monkeypatch.setattr("upit.model.cuda_graphs._Graphs", Counted)
    monkeypatch.setattr(Counted, "replays", 0)
    ends = []
    for finish in (plain_finish, graphed_finish):
        monkeypatch.setattr(CausalLMModule, "finish", finish)
        module = make_module()
        settings = {"accumulate_grad_batches": accumulate, "val_check_interval": 4}
        trainer = make_trainer(tmp_path / finish.__name__, make_callbacks(), **settings)
        trainer.fit(module, datamodule=make_data())
        assert module.phase == "moe"
        ends.append(torch.cat([param.detach().flatten() for param in module.lm.parameters()]))
    assert Counted.replays == 10 * accumulate
    torch.testing.assert_close(ends[1], ends[0])
