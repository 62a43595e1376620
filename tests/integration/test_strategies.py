"""Whole fits with experts from every source, under every router initialisation."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import make_callbacks, make_module, make_trainer
from upit.expansion.merging import DareTies, Slerp, Ties
from upit.expansion.selection import MostDiverse, RandomParents
from upit.expansion.similarity import Euclidean, Functional
from upit.offline.export_checkpoint import export_checkpoint
from upit.preparation.sources import Checkpoints, Copies, DropUpcycling, Harvested
from upit.report.run import read_lineage
from upit.router_init import HiddenMean, RandomRouter, Ridge, RoutingVectors
from upit.router_init.seeds import RandomAssignment, RelativeLoss
from upit.upcycling.non_experts import LastNonExperts, MeanNonExperts


def fit(make_data, run, upcycling, **moe):
    module = make_module(**moe)
    callbacks = make_callbacks({"every_n_steps": 2}, {"at_step": 4, **upcycling}, report=False)
    make_trainer(run, callbacks, max_steps=5).fit(module, datamodule=make_data())
    return module, callbacks[1], read_lineage(run / "upcycling/lineage.json")


@pytest.mark.parametrize(
    ("upcycling", "kinds"),
    [
        (
            {"source": Copies(), "router": RoutingVectors(epochs=1), "assignment": RandomAssignment()},
            ["copy"] * 4,
        ),
        ({"source": Copies(noise_std=0.01), "router": Ridge()}, ["copy"] * 4),
        ({"source": DropUpcycling(), "router": HiddenMean(), "assignment": RelativeLoss()}, ["drop_upcycling"] * 4),
        (
            {"source": Harvested(base=True), "router": Ridge(), "non_experts": MeanNonExperts(), "merge": Ties()},
            ["base", "harvested", "harvested", "merged"],
        ),
        (
            {"similarity": Functional(), "merge": Slerp(), "router": HiddenMean()},
            ["harvested", "harvested", "merged", "merged"],
        ),
        (
            {"similarity": Euclidean(), "merge": DareTies(), "parents": RandomParents(), "router": RandomRouter()},
            ["harvested", "harvested", "merged", "merged"],
        ),
    ],
    ids=lambda value: "-".join(map(repr, value.values())) if isinstance(value, dict) else "",
)
def test_any_source_with_any_router(make_data, tmp_path, upcycling, kinds):
    module, callback, lineage = fit(make_data, tmp_path, upcycling)
    assert module.phase == "moe"
    assert [entry["kind"] for entry in lineage] == kinds
    assert callback.drift > -1e-6, "a divergence, up to rounding"


def test_copies_do_not_drift(make_data, tmp_path):
    """N copies of the dense model are the dense model, whatever the router."""
    _, callback, _ = fit(make_data, tmp_path, {"source": Copies(), "router": Ridge()})
    assert abs(callback.drift) < 1e-6


def test_checkpoints_of_another_run(finished, make_data, tmp_path):
    run, _, _ = finished
    source = Checkpoints([str(run / "experts")])
    module, _, lineage = fit(
        make_data, tmp_path, {"source": source, "non_experts": LastNonExperts(), "router": RandomRouter()}
    )
    assert [entry.get("path") for entry in lineage[:2]] == [str(run / "experts")] * 2
    assert module.phase == "moe"


def test_fewer_experts_than_checkpoints(make_data, tmp_path):
    upcycling = {"selection": MostDiverse(), "router": RandomRouter()}
    _, _, lineage = fit(make_data, tmp_path, upcycling, num_experts=1, top_k=1)
    assert [entry["step"] for entry in lineage] == [4]


@pytest.mark.parametrize(
    ("upcycling", "message"),
    [
        ({"source": Copies(), "non_experts": MeanNonExperts()}, "source=Copies.* come without the parameters"),
        ({"source": Harvested("first_half"), "at_step": 3}, "at least 2 checkpoints to merge, there are 1"),
    ],
)
def test_refused_before_training(make_data, tmp_path, upcycling, message):
    with pytest.raises(ValueError, match=message):
        fit(make_data, tmp_path, upcycling)


def test_branch_train_mix(finished, make_data, tmp_path):
    """Two exported dense models become the experts; everything else is their mean."""
    run, _, _ = finished
    models = [export_checkpoint(run / f"checkpoints/step={step}.ckpt", tmp_path / f"m/{step}") for step in (2, 5)]
    module = make_module(num_experts=2, top_k=1, lr=0.0)
    upcycling = {
        "at_step": 1,
        "source": Checkpoints([f"{tmp_path}/m/*"]),
        "non_experts": MeanNonExperts(),
        "router": RandomRouter(),
    }
    callbacks = make_callbacks({"at_steps": [1]}, upcycling, report=False)
    make_trainer(tmp_path / "run", callbacks, max_steps=2).fit(module, datamodule=make_data())
    first, second = (load_file(model / "model.safetensors") for model in models)
    found = module.lm.state_dict()
    norm = "model.layers.1.post_attention_layernorm.weight"
    torch.testing.assert_close(found[norm], (first[norm] + second[norm]) / 2)
    experts = found["model.layers.1.mlp.experts.down_proj"]
    for expert, dense in zip(experts, (first, second), strict=True):
        assert torch.equal(expert, dense["model.layers.1.mlp.down_proj.weight"])


def test_the_z_loss_keeps_router_logits_small(make_data, tmp_path):
    def router_norm(weight):
        run = tmp_path / str(weight)
        module, _, _ = fit(make_data, run, {"router": HiddenMean()}, router_z_loss_weight=weight, lr=1e-2)
        assert ("moe/router_z_loss" in (run / "metrics.csv").read_text()) == (weight > 0)
        return float(module.lm.model.layers[0].mlp.gate.weight.norm())

    assert router_norm(10.0) < router_norm(0.0)
