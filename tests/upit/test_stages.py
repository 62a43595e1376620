"""The stages on files, from the command line."""

import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.upit.tiny import dense_model
from upit.cli import STAGES, main
from upit.forward import moe_routers


@pytest.fixture
def checkpoints(tmp_path):
    paths = [tmp_path / f"dense_{seed}" for seed in range(3)]
    for seed, path in enumerate(paths):
        dense_model("llama", seed).save_pretrained(path)
    return [str(path) for path in paths]


def run(command, **keys):
    main([command, *(part for key, value in keys.items() for part in (f"--{key}", str(value)))])


def test_upcycle_by_flags_and_by_config_agree(checkpoints, tmp_path, capsys):
    run("upcycle", base=checkpoints[0], experts=checkpoints, output=tmp_path / "a", seed=3)
    assert "3 experts, top-2: needs" in capsys.readouterr().out
    keys = {
        "base": checkpoints[0],
        "experts": checkpoints,
        "output": str(tmp_path / "b"),
        "router": "Random",
        "seed": 3,
    }
    (tmp_path / "upcycle.yaml").write_text(yaml.safe_dump(keys))
    main(["upcycle", "--config", str(tmp_path / "upcycle.yaml")])
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    gates = torch.stack([gate.weight for gate in moe_routers(AutoModelForCausalLM.from_pretrained(tmp_path / "a"))])
    assert gates.shape == (2, 3, 32)
    assert gates.std().item() == pytest.approx(0.02, rel=0.2)


def test_upcycle_overwrites_only_when_told(checkpoints, tmp_path):
    keys = {"base": checkpoints[0], "experts": checkpoints[:2], "output": tmp_path / "moe"}
    run("upcycle", **keys)
    with pytest.raises(SystemExit, match="is not empty"):
        run("upcycle", **keys)
    main(
        [
            "upcycle",
            "--overwrite",
            "--base",
            checkpoints[0],
            "--experts",
            str(checkpoints),
            "--output",
            str(keys["output"]),
        ]
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").config.num_local_experts == 3


def test_upcycle_says_what_a_router_lacks(checkpoints, tmp_path):
    with pytest.raises(SystemExit, match=r"router=Ridge\(strength=0.1\) learns from seed data: set data"):
        run(
            "upcycle",
            base=checkpoints[0],
            experts=checkpoints,
            output=tmp_path / "moe",
            router="Ridge",
            **{"router.strength": 0.1},
        )


@pytest.mark.parametrize("command", STAGES)
def test_help_is_cheap(command):
    script = (
        f"import sys; from upit.cli import main; main(['{command}', '--help'])\n"
        "assert not {'torch', 'transformers', 'lightning', 'jsonargparse'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "output: " in done.stdout or "inspect" in command
