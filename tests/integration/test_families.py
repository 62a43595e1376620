"""The whole method in one fit from a pretrained directory of each family."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_modules import DenseModule, MoEModule, UpITModule
from tests.conftest import make_callbacks, make_trainer
from tests.upit.tiny import dense_model
from upit.model.families import FAMILIES


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_fit_from_a_pretrained_directory(family, data, make_data, tmp_path):
    special = {f"{kind}_token_id": getattr(data.tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    dense = dense_model(family, vocab_size=len(data.tokenizer), **special)
    dense.save_pretrained(tmp_path / "dense")
    module = UpITModule(
        DenseModule(model=str(tmp_path / "dense"), lr=1e-3, max_new_tokens=4),
        MoEModule(num_experts=3, top_k=2, lr=1e-3, max_new_tokens=4),
    )
    callbacks = make_callbacks({"every_n_steps": 1}, {"at_step": 2})
    trainer = make_trainer(tmp_path / "run", callbacks, max_steps=4)
    trainer.fit(module, datamodule=make_data())
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export", output_loading_info=True)
    assert stock.config.model_type == FAMILIES[family].moe_type
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    state = module.lm.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, state[name]), name
