"""Export: stock transformers loads it, nothing is overwritten, the card says where it comes from."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import TINY
from upit.core.files import write_json
from upit.core.finite import NotFiniteError
from upit.model.families import moe_config
from upit.model.loading.build import build, scratch_config
from upit.model.loading.identity import identity_of
from upit.report.model_card import model_card
from upit.report.run import write_lineage
from upit.upcycling.export import export_model


@pytest.fixture(params=["dense", "moe"])
def model(request, data):
    dense = build(scratch_config(TINY, data.tokenizer)).eval()
    return dense if request.param == "dense" else build(moe_config(dense.config, num_experts=4, top_k=2)).eval()


def export(model, data, output):
    return export_model(model.config, model.state_dict(), data.tokenizer, output, card="# card\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_transformers_loads_it_whole(model, data, tmp_path, dtype):
    model = model.to(dtype)
    output = export(model, data, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert "upit" not in (output / "config.json").read_text()
    fields = json.loads((output / "config.json").read_text())
    assert fields["rope_theta"] == model.config.rope_parameters["rope_theta"]
    assert fields.get("num_experts") == getattr(model.config, "num_experts", None)
    assert "TokenizersBackend" not in (output / "tokenizer_config.json").read_text()
    assert (output / "README.md").read_text() == "# card\n"
    assert not list(output.parent.glob("*.tmp"))


def test_the_tokenizer_and_its_end_of_turn_come_along(model, data, tmp_path):
    output = export(model, data, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(output)
    text = "What is 3 + 4?"
    assert tokenizer(text)["input_ids"] == data.tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == data.tokenizer.chat_template
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == data.tokenizer.eos_token_id
    assert generation["pad_token_id"] == data.tokenizer.pad_token_id


def test_nothing_is_overwritten(model, data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in ("full", "file"):
        with pytest.raises(FileExistsError, match="not empty; name another directory"):
            export(model, data, tmp_path / taken)
    (tmp_path / "empty").mkdir()
    export(model, data, tmp_path / "empty")


def test_weights_that_do_not_fit_are_named_and_leave_no_output(model, data, tmp_path):
    weights = model.state_dict()
    weights["surplus"] = weights.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\], unexpected \['surplus'\]"):
        export_model(model.config, weights, data.tokenizer, tmp_path / "out", card="")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named_and_leave_no_output(model, data, tmp_path, value):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = value
    said = r"1 of \d+ weights hold NaN or infinity, the first is 'model\.layers\.1\.self_attn\.q_proj\.weight'"
    with pytest.raises(NotFiniteError, match=said):
        export_model(model.config, weights, data.tokenizer, tmp_path / "out", card="")
    assert not list(tmp_path.iterdir())


def scores_at(step: int, loss: float = 1.25) -> dict:
    scores = {"loss": loss, "exact_match": 0.5}
    return {"step": step, "domains": {"letters": scores, "sums": scores}, "average": scores}


@pytest.mark.parametrize(
    ("phase", "step", "reached"),
    [
        ("dense", 5, ["base"]),
        ("dense", 6, ["base", "dense"]),
        ("moe", 6, ["base", "dense", "swap"]),
        ("moe", 9, ["base", "dense", "swap"]),
        ("moe", 10, ["base", "dense", "swap", "final"]),
    ],
)
def test_the_card_has_no_scores_of_a_later_model(dense, tmp_path, phase, step, reached):
    steps = {"base": 0, "dense": 6, "swap": 6, "final": 10}
    write_json(tmp_path / "report.json", {"stages": {stage: scores_at(at) for stage, at in steps.items()}})
    card = model_card(identity_of(dense, phase=phase, swap_step=6) | {"global_step": step}, tmp_path, name="mine")
    assert [stage for stage in steps if f"| {stage} |" in card] == reached


def test_the_card_tells_method_lineage_data_and_metrics(model, data, tmp_path):
    moe = model.config.model_type == "mixtral"
    lineage = [
        {"expert": 0, "kind": "harvested", "step": 12, "epoch": 0.5},
        {"expert": 1, "kind": "merged", "parents": [0, 0], "alpha": 0.25, "beta": 0.75,
         "merge": {"name": "Dare", "drop_rate": 0.2}},
        {"expert": 2, "kind": "base"},
        {"expert": 3, "kind": "copy", "source": {"name": "Copies", "noise_std": 0.1}},
        {"expert": 4, "kind": "checkpoint", "path": "there"},
    ]  # fmt: skip
    write_lineage(tmp_path / "upcycling/lineage.json", lineage)
    stages = {"base": scores_at(0, math.nan), "dense": scores_at(6)}
    write_json(tmp_path / "report.json", {"stages": stages})
    identity = identity_of(model, phase="moe" if moe else "dense", swap_step=6) | {"global_step": 6}
    card = model_card(identity, tmp_path, name="mine")
    assert "arXiv:2410.01610" in card
    assert "letters, sums" in card
    assert "| dense | 1.2500 | 50.0% |" in card
    assert "| base | nan | 50.0% |" in card
    assert "trained for 6 optimizer steps" in card
    assert 'from_pretrained("mine")' in card
    assert ("4 experts, top-2" in card) == moe
    assert ("checkpoint of step 12 (epoch 0.50)" in card) == moe
    assert ("0.25 x expert 0 + 0.75 x expert 0, Dare (drop_rate 0.2)" in card) == moe
    assert ("Copies (noise_std 0.1)" in card) == ("checkpoint in there" in card) == moe
    assert card.startswith("---\n")


def test_a_card_needs_no_run(model, tmp_path):
    identity = identity_of(model, phase="dense", swap_step=None) | {"global_step": 1}
    assert "# mine" in model_card(identity, tmp_path, name="mine")
