"""Configs read in another process, without torch, are those read here."""

import subprocess
import sys

from tests.upit.tiny import dense_model
from upit.config_files import read_configs

ALONE = """
import sys
from pathlib import Path
from upit.config_files import read_configs
print(read_configs(Path(sys.argv[1]), [Path(sys.argv[2])], num_experts=4, top_k=2))
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_another_process_reads_the_same(tmp_path):
    paths = [tmp_path / family for family in ("qwen2", "olmo2")]
    for path in paths:
        dense_model(path.name).save_pretrained(path)
    done = subprocess.run([sys.executable, "-c", ALONE, *paths], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == str(read_configs(paths[0], paths[1:], num_experts=4, top_k=2))
