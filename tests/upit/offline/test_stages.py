"""The stages on files, from the command line."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.upit.tiny import dense_model
from upit.cli.main import main
from upit.cli.stages import STAGES
from upit.core.files import read_json
from upit.core.tensor_files import TensorFiles
from upit.expansion.device_cache import CPU
from upit.model.families import moe_config
from upit.model.routers import moe_routers
from upit.offline.standalone import learning_estimate
from upit.preparation.moe_files import MoEFiles
from upit.preparation.pool import Pool
from upit.report.run import read_lineage
from upit.router_init import RandomRouter, RoutingVectors

LIGHT = (
    "import sys; from upit.cli.main import main; main(sys.argv[1:])\n"
    "assert not {'transformers', 'torch.distributed.tensor'} & set(sys.modules)"
)


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
        "router": "RandomRouter",
        "seed": 3,
    }
    (tmp_path / "upcycle.yaml").write_text(yaml.safe_dump(keys))
    main(["upcycle", "--config", str(tmp_path / "upcycle.yaml")])
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    gates = torch.stack([gate.weight for gate in moe_routers(AutoModelForCausalLM.from_pretrained(tmp_path / "a"))])
    assert gates.shape == (2, 3, 32)
    assert gates.std().item() == pytest.approx(0.02, rel=0.2)


def test_upcycle_unties_the_head(checkpoints, tmp_path):
    keys = ["upcycle", "--base", checkpoints[0], "--experts", str(checkpoints), "--output"]
    main([*keys, str(tmp_path / "tied")])
    main([*keys[:1], "--untie", *keys[1:], str(tmp_path / "untied")])
    tied, untied = (load_file(tmp_path / name / "model.safetensors") for name in ("tied", "untied"))
    assert untied.keys() - tied.keys() == {"lm_head.weight"}
    assert torch.equal(untied["lm_head.weight"], tied["model.embed_tokens.weight"])
    assert read_json(tmp_path / "untied/config.json")["tie_word_embeddings"] is False
    tied, untied = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("tied", "untied"))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(tied(ids).logits, untied(ids).logits)


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


def test_upcycle_in_a_process_of_its_own_imports_no_transformers_and_gives_the_same(checkpoints, tmp_path):
    keys = ["--base", checkpoints[0], "--experts", str(checkpoints), "--output"]
    command = [sys.executable, "-c", LIGHT, "upcycle", *keys]
    subprocess.run([*command, str(tmp_path / "alone")], check=True)
    main(["upcycle", *keys, str(tmp_path / "here")])
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "here"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_json(tmp_path / "alone/config.json") == read_json(tmp_path / "here/config.json")
    refused = subprocess.run([*command, str(tmp_path / "no"), "--top_k", "9"], capture_output=True, text=True)
    assert "upcycle: error: top_k=9 must lie between 1 and num_experts=3" in refused.stderr


def test_expand_in_a_process_of_its_own_imports_no_transformers(checkpoints, tmp_path):
    keys = ["--base", checkpoints[0], "--experts", str(checkpoints), "--num_experts", "4", "--output"]
    subprocess.run([sys.executable, "-c", LIGHT, "expand", *keys, str(tmp_path / "pool")], check=True)
    assert len(Pool.load(tmp_path / "pool").experts) == 4


def test_export_unties_the_head(finished, tmp_path):
    folder, _, _ = finished
    checkpoint = next((folder / "checkpoints").glob("*=9.ckpt"))
    for name, flags in (("tied", []), ("untied", ["--untie"])):
        main(["export", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / name), *flags])
    tied, untied = (load_file(tmp_path / name / "model.safetensors") for name in ("tied", "untied"))
    assert untied.keys() - tied.keys() == {"lm_head.weight"}
    assert torch.equal(untied["lm_head.weight"], tied["model.embed_tokens.weight"])
    assert [read_json(tmp_path / name / "config.json")["tie_word_embeddings"] for name in ("tied", "untied")] == [
        True,
        False,
    ]


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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"router": "Nope"}, "valid choices of RouterInit: upit.router_init.FromFile, upit.router_init.HiddenMean, "),
        ({"router": "Ridge", "router.strength": 0}, "Ridge.strength=0.0 must be positive"),
        ({"dtype": "int8"}, "['float32', 'bfloat16', 'float16']"),
        ({"max_shard_gb": 0}, "max_shard_gb=0.0 must be positive"),
    ],
    ids=str,
)
def test_wrong_flags_are_told_in_a_few_lines(checkpoints, tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        run("upcycle", base=checkpoints[0], experts=checkpoints, output=tmp_path / "moe", **flags)
    text = capsys.readouterr().err + str(stop.value)
    assert said in text
    assert "Does not validate" not in text
    assert "usage" not in text


@pytest.mark.parametrize("command", STAGES)
def test_help_is_cheap(command):
    script = (
        f"import sys; from upit.cli.main import main; main(['{command}', '--help'])\n"
        "assert not {'torch', 'transformers', 'lightning', 'jsonargparse'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "output: " in done.stdout or "inspect" in command


def expand(checkpoints, output, **keys):
    run("expand", base=checkpoints[0], experts=checkpoints[1:], output=output, **{"num_experts": 4, **keys})


def test_expand_writes_a_pool_that_upcycle_takes(checkpoints, tmp_path):
    expand(checkpoints, tmp_path / "pool", merge="Linear", seed=1)
    pool = Pool.load(tmp_path / "pool")
    pool.verify()
    lineage = read_lineage(tmp_path / "pool/lineage.json")
    assert [entry["kind"] for entry in lineage] == ["checkpoint", "checkpoint", "merged", "merged"]
    assert [expert.origin["kind"] for expert in pool.experts] == [entry["kind"] for entry in lineage]
    assert len(read_json(tmp_path / "pool/similarity.json")) == 4
    first, second, child, _ = pool.experts
    name = "model.layers.1.mlp.up_proj.weight"
    alpha = lineage[2]["alpha"]
    assert lineage[2]["parents"] == [0, 1]
    torch.testing.assert_close(child.read(name), alpha * first.read(name) + (1 - alpha) * second.read(name))
    assert torch.equal(first.read(name), dense_model("llama", 1).state_dict()[name])
    run("upcycle", base=checkpoints[0], experts=[str(pool.directory)], output=tmp_path / "moe")
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert torch.equal(moe.model.layers[1].mlp.experts.gate_up_proj[2, 48:], child.read(name))


def test_expand_of_a_pool_keeps_its_lineage_and_selects(checkpoints, tmp_path):
    expand(checkpoints, tmp_path / "four")
    four = str(tmp_path / "four")
    run("expand", base=four, experts=[four], output=tmp_path / "two", num_experts=2, selection="LastCheckpoints")
    two = Pool.load(tmp_path / "two")
    assert [expert.origin["kind"] for expert in two.experts] == ["merged", "merged"]
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(two.base.read(name), dense_model("llama", 0).state_dict()[name])


def test_expand_resumes_and_overwrites_only_when_told(checkpoints, tmp_path, monkeypatch):
    pool = tmp_path / "pool"

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "gather", killed)
        with pytest.raises(KeyboardInterrupt):
            expand(checkpoints, pool)
    before = {file.name: file.stat().st_mtime_ns for file in pool.glob("merged_*.safetensors")}
    assert len(before) == 2
    expand(checkpoints, pool)
    assert {file.name: file.stat().st_mtime_ns for file in pool.glob("merged_*.safetensors")} == before
    with pytest.raises(SystemExit, match="holds a pool already"):
        expand(checkpoints, pool)
    with pytest.raises(SystemExit, match="is one of the inputs"):
        run("expand", base=pool, experts=[str(pool)], output=pool, num_experts=5, overwrite="true")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(SystemExit, match="disk"):
            expand(checkpoints, pool, num_experts=3, overwrite="true")
    assert len(Pool.load(pool).experts) == 4, "what can't be replaced stays"
    expand(checkpoints, pool, num_experts=3, overwrite="true")
    assert len(Pool.load(pool).experts) == 3
    (pool / "thesis.tex").write_text("")
    with pytest.raises(SystemExit, match="holds more than a pool"):
        expand(checkpoints, pool, overwrite="true")


def test_expand_names_what_does_not_fit(checkpoints, tmp_path):
    dense_model("llama", intermediate_size=40).save_pretrained(tmp_path / "odd")
    with pytest.raises(SystemExit, match=r"odd/config\.json: intermediate_size=40, the dense model has 48"):
        expand([*checkpoints, str(tmp_path / "odd")], tmp_path / "pool")
    dense_model("llama", vocab_size=65).save_pretrained(tmp_path / "words")
    with pytest.raises(SystemExit, match=r"words/config\.json: vocab_size=65, the dense model has 64"):
        expand([*checkpoints, str(tmp_path / "words")], tmp_path / "pool")
    with pytest.raises(SystemExit, match="experts: nothing is at"):
        expand([*checkpoints, str(tmp_path / "nowhere")], tmp_path / "pool")
    with pytest.raises(SystemExit, match="at least 2 checkpoints to merge"):
        expand(checkpoints[:2], tmp_path / "pool")
    with pytest.raises(SystemExit, match=r"similarity=Functional\(\) compares losses .* choices: Cosine, Euclidean$"):
        expand(checkpoints, tmp_path / "pool", similarity="Functional")
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        (
            {"parents": "BestParents", "parents.metric": "val/loss"},
            r"BestParents\.metric='val/loss': no expert comes with it",
        ),
        ({"similarity": "Functional"}, "valid choices: Cosine, Euclidean"),
        ({"device": "tpu"}, "device='tpu' is no device"),
    ],
    ids=str,
)
def test_expand_refuses_before_it_overwrites(checkpoints, tmp_path, flags, said):
    expand(checkpoints, tmp_path / "pool")
    with pytest.raises(SystemExit, match=said):
        expand(checkpoints, tmp_path / "pool", overwrite="true", **flags)
    Pool.load(tmp_path / "pool").verify()


def test_expand_works_on_the_device_that_is_said(checkpoints, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("upit.expansion.device_cache.checked_device", lambda *_: CPU)
    monkeypatch.setattr("upit.expansion.expand.checked_device", lambda name, _: said.append(name) or CPU)
    expand(checkpoints, tmp_path / "pool", device="cuda")
    assert said == ["cuda"]


# --- routers -----------------------------------------------------------------------------------------


@pytest.fixture
def trained(checkpoints, data):
    """Checkpoints whose tokenizer is the data's, and flags that name the data."""
    special = {f"{kind}_token_id": getattr(data.tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    for seed, path in enumerate(checkpoints):
        dense_model("llama", seed, vocab_size=len(data.tokenizer), **special).save_pretrained(path)
    settings = {name: getattr(data, name) for name in ("families", "train_size", "heldout_size")}
    settings |= {"cache_dir": str(data.cache_dir), "vocab_size": 320, "max_length": 128, "batch_size": 4}
    return checkpoints, {"class_path": "datamodules.ReasoningGymDataModule", "init_args": settings}


def by_config(command, tmp_path, **keys):
    (tmp_path / f"{command}.yaml").write_text(yaml.safe_dump(keys))
    main([command, "--config", str(tmp_path / f"{command}.yaml")])


def gates_of(path):
    return torch.stack([gate.weight for gate in moe_routers(AutoModelForCausalLM.from_pretrained(path))])


def test_a_router_for_experts_serves_upcycle(trained, tmp_path):
    checkpoints, data = trained
    common = {"base": checkpoints[0], "experts": checkpoints, "seed_fraction": 0.1}
    by_config("init-router", tmp_path, output=str(tmp_path / "router"), router="HiddenMean", data=data, **common)
    run(
        "upcycle",
        base=checkpoints[0],
        experts=checkpoints,
        output=tmp_path / "a",
        router="FromFile",
        **{"router.path": tmp_path / "router/router.safetensors"},
    )
    by_config("upcycle", tmp_path, output=str(tmp_path / "b"), router="HiddenMean", data=data, **common)
    assert torch.equal(gates_of(tmp_path / "a"), gates_of(tmp_path / "b"))
    torch.testing.assert_close(gates_of(tmp_path / "a").norm(dim=-1), torch.ones(2, 3))


def test_a_moe_gets_a_new_router_and_keeps_the_rest(trained, tmp_path):
    checkpoints, data = trained
    run("upcycle", base=checkpoints[0], experts=checkpoints, output=tmp_path / "moe")
    moe, out = str(tmp_path / "moe"), str(tmp_path / "new")
    (tmp_path / "moe/additional_chat_templates").mkdir()
    (tmp_path / "moe/additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    (tmp_path / "moe/pytorch_model.bin").write_text("an old router")
    router = {"class_path": "RoutingVectors", "init_args": {"epochs": 1}}
    keys = {"base": checkpoints[0], "moe": moe, "output": out, "data": data, "seed_fraction": 0.1}
    by_config("init-router", tmp_path, router=router, **keys)
    ours, theirs = load_file(tmp_path / "new/model.safetensors"), load_file(tmp_path / "moe/model.safetensors")
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert changed == {f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(2)}
    assert ours.keys() == theirs.keys()
    assert (tmp_path / "new/config.json").read_text() == (tmp_path / "moe/config.json").read_text()
    assert read_json(tmp_path / "new/config.json")["num_experts"] == 3
    assert (tmp_path / "new/additional_chat_templates/rag.jinja").exists()
    assert not (tmp_path / "new/pytorch_model.bin").exists()
    run("init-router", base=checkpoints[0], moe=moe, output=tmp_path / "random", router="RandomRouter", seed=5)
    run("upcycle", base=checkpoints[0], experts=checkpoints, output=tmp_path / "same", seed=5)
    assert torch.equal(gates_of(tmp_path / "random"), gates_of(tmp_path / "same"))


def test_a_moe_of_stock_transformers_comes_out_portable(checkpoints, tmp_path):
    moe = moe_config(AutoConfig.from_pretrained(checkpoints[0]), num_experts=3, top_k=2)
    AutoModelForCausalLM.from_config(moe).save_pretrained(tmp_path / "moe")
    assert "num_experts" not in read_json(tmp_path / "moe/config.json")
    run("init-router", base=checkpoints[0], moe=tmp_path / "moe", output=tmp_path / "new", router="RandomRouter")
    written = read_json(tmp_path / "new/config.json")
    assert (written["num_experts"], written["rope_theta"]) == (3, 5e4)


def test_a_router_of_another_architecture_is_refused(checkpoints, tmp_path):
    run("init-router", base=checkpoints[0], experts=checkpoints, output=tmp_path / "router", router="RandomRouter")
    others = [tmp_path / f"other_{seed}" for seed in range(3)]
    for seed, path in enumerate(others):
        dense_model("llama", seed, rms_norm_eps=1e-5).save_pretrained(path)
    keys = {"router": "FromFile", "router.path": tmp_path / "router/router.safetensors", "output": tmp_path / "moe"}
    with pytest.raises(SystemExit, match=r"router.safetensors: rms_norm_eps=1e-06, the dense model has 1e-05"):
        run("upcycle", base=others[0], experts=[str(path) for path in others], **keys)
    assert not (tmp_path / "moe").exists()
    run("upcycle", base=checkpoints[0], experts=checkpoints, **keys)


def test_init_router_wants_one_of_moe_and_experts(checkpoints, tmp_path):
    with pytest.raises(SystemExit, match="give one of moe and experts"):
        run("init-router", base=checkpoints[0], output=tmp_path / "out")
    with pytest.raises(SystemExit, match="is a 'llama', no MoE"):
        run("init-router", base=checkpoints[0], moe=checkpoints[1], output=tmp_path / "out", router="RandomRouter")


def test_init_router_names_what_does_not_fit_before_any_work(checkpoints, tmp_path):
    dense_model("llama", intermediate_size=40).save_pretrained(tmp_path / "narrow")
    dense_model("llama", vocab_size=80).save_pretrained(tmp_path / "wide")
    run("upcycle", base=checkpoints[0], experts=checkpoints, output=tmp_path / "moe")
    keys = {"output": tmp_path / "out", "router": "Ridge", "router.strength": 0.1}
    with pytest.raises(SystemExit, match=r"narrow/config\.json: intermediate_size=40, the dense model has 48"):
        run("init-router", base=checkpoints[0], experts=[*checkpoints, str(tmp_path / "narrow")], **keys)
    with pytest.raises(SystemExit, match=r"moe/config\.json: vocab_size=64, the dense model has 80"):
        run("init-router", base=tmp_path / "wide", moe=tmp_path / "moe", **keys)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    dense_model("llama", rope_parameters=rope).save_pretrained(tmp_path / "wide")
    with pytest.raises(
        SystemExit, match=r"moe/config\.json: rope_parameters.rope_theta=50000.0, the dense .* 1000000"
    ):
        run("init-router", base=tmp_path / "wide", moe=tmp_path / "moe", **keys)
    tensors = load_file(tmp_path / "moe/model.safetensors")
    router = "model.layers.1.block_sparse_moe.gate.weight"
    save_file({name: tensors[name] for name in tensors if name != router}, tmp_path / "moe/model.safetensors")
    with pytest.raises(SystemExit, match=rf"moe: tensor '{router}' is missing"):
        run("init-router", base=checkpoints[0], moe=tmp_path / "moe", **keys)
    assert {path.name for path in tmp_path.iterdir()} == {"narrow", "wide", "moe", *(f"dense_{i}" for i in range(3))}


def test_routers_say_what_they_need(checkpoints, tmp_path, capsys):
    files = TensorFiles(Path(checkpoints[0]))
    numbers = sum(math.prod(entry.shape) for entry in files.values())
    inner = sum(math.prod(entry.shape) for name, entry in files.items() if ".mlp." in name)
    assert learning_estimate(RandomRouter(), files, 3) == (0, 0)
    assert learning_estimate(RoutingVectors(), files, 3) == (4 * numbers, 0)
    assert learning_estimate(RoutingVectors(expert_lr=1e-4), files, 3) == (4 * numbers + 12 * inner, 12 * inner)
    run("init-router", base=checkpoints[0], experts=checkpoints, output=tmp_path / "router", router="RandomRouter")
    assert "Router of 3 experts: needs 0 MB of memory, 0.00 GB on disk" in capsys.readouterr().out
    run("upcycle", base=checkpoints[0], experts=checkpoints, output=tmp_path / "moe")
    size = (tmp_path / "moe/model.safetensors").stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(SystemExit, match="of disk"):
            run(
                "init-router",
                base=checkpoints[0],
                moe=tmp_path / "moe",
                output=tmp_path / "new",
                router="RandomRouter",
            )
    assert 0 < size - MoEFiles(tmp_path / "moe").estimate().disk < 8192, "all but the header"


# --- inspect -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_inspect_shows_a_pool_and_a_model(checkpoints, tmp_path, capsys):
    expand(checkpoints, tmp_path / "pool")
    run("upcycle", base=checkpoints[0], experts=[checkpoints[0], checkpoints[0]], output=tmp_path / "copies")
    capsys.readouterr()
    main(["inspect", str(tmp_path / "pool")])
    shown = capsys.readouterr().out
    assert "expert_00.safetensors" in shown
    assert "x expert 0 +" in shown
    assert "Similarity" in shown
    main(["inspect", str(tmp_path / "copies")])
    shown = capsys.readouterr().out
    assert "2, top-2" in shown
    assert shown.count("1.0000 (1.0000 to 1.0000)") == 2  # identical experts, in both layers
    with pytest.raises(SystemExit, match="is no run"):
        main(["inspect", str(tmp_path)])


def test_inspect_shows_a_run_that_has_not_swapped_yet(finished, tmp_path, capsys):
    folder, _, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    report = json.loads((folder / "report.json").read_text())
    changes = {"seed_counts": [], "num_experts": None, "stages": {"base": report["stages"]["base"]}}
    (tmp_path / "run/report.json").write_text(json.dumps(report | changes))
    main(["inspect", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert "checkpoint of step 3" in shown
    assert "None" not in shown


def test_inspect_shows_a_run_and_its_checkpoint(finished, capsys):
    folder, _, _ = finished
    main(["inspect", str(folder)])
    shown = capsys.readouterr().out
    assert "step_0000003.safetensors" in shown
    assert "seed examples" in shown
    assert "Held-out loss" in shown
    main(["inspect", str(next((folder / "checkpoints").glob("*=9.ckpt")))])
    shown = capsys.readouterr().out
    assert "mixtral" in shown
    assert "moe" in shown
