"""The build step that packages configs/; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path("configs")


class BuildWithConfigs(build_py):
    """Copy configs/ into the wheel as upit/configs/. An editable install reads configs/ in place."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "upit", "configs")
            shutil.rmtree(target, ignore_errors=True)  # left in build/ by an earlier build
            shutil.copytree(CONFIGS, target)

    def get_source_files(self) -> list[str]:
        """Files of the sdist."""
        return [*super().get_source_files(), *(str(file) for file in CONFIGS.rglob("*") if file.is_file())]


setup(cmdclass={"build_py": BuildWithConfigs})
