"""Modules in the user's own folder, for a ``class_path``."""

import os
import sys
from pathlib import Path

PACKAGES = ("callbacks", "datamodules", "lightning_modules")  # upit's own, whose names are common ones


def find_own_modules() -> None:
    """Let modules of the working directory be imported, after all installed ones.

    Raises: ValueError: one of them has the name of a package of upit's, which would hide it or be hidden by it.
    """
    here = Path.cwd()
    if (here / "upit" / "__init__.py").exists():  # a clone of upit
        return
    for name in PACKAGES:
        folder, file = here / name, here / f"{name}.py"
        if file.exists() or any(folder.glob("*.py")):
            taken = file if file.exists() else folder
            raise ValueError(f"{str(taken)!r} has the name of a package of upit's: rename it")
    if str(here) not in (os.path.abspath(path) for path in sys.path):
        sys.path.append(str(here))
