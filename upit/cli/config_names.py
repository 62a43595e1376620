"""Configs by name: ``-c quickstart`` means a file of ``./configs``, or one of the configs that come with upit."""

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from jsonargparse import ActionConfigFile

LOCAL = Path("configs")
SUFFIX = ".yaml"


class ConfigByName(ActionConfigFile):
    """A parser's option for configs that also takes their names; see :func:`find`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs | {"help": "a YAML file, or the name of a config; `upit configs` lists the names"})

    def __call__(self, parser, cfg, values, option_string=None):
        if not any(sign in values for sign in ("\n", "{", ":")):  # otherwise YAML text, or a URL
            try:
                values = str(find(values))
            except FileNotFoundError as error:
                raise TypeError(str(error)) from None  # the parser's kind of error
        super().__call__(parser, cfg, values, option_string)


def packaged() -> Path:
    """The folder of the configs that come with upit: in the installed package, or at the root of a clone."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def names(folder: Path) -> dict[str, Path]:
    """The configs of a folder, ``{"ablations/no_capacity": file}``. Those directly in it come first."""
    files = sorted(folder.rglob(f"*{SUFFIX}"), key=lambda file: (len(file.relative_to(folder).parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def known() -> dict[str, Path]:
    """All configs that have a name. A config in ``./configs`` hides one of the same name that comes with upit."""
    return names(packaged()) | names(LOCAL)


def find(config: str) -> Path:
    """The file of a config.

    Args:
        config: path of a file, or a name with or without ``.yaml``. A file with this path is taken first, then a name
            in ``./configs``, then a name of the configs that come with upit.
    Raises: FileNotFoundError: no such file and no such name. The message gives similar names.
    """
    path = Path(config)
    return path if path.exists() and not path.is_dir() else _named(config)[1]


def _named(config: str) -> tuple[str, Path]:
    choices, name = known(), config.removesuffix(SUFFIX)
    if name in choices:
        return name, choices[name]
    similar = _similar(name, choices)
    hint = f"similar names: {', '.join(similar)}" if similar else "`upit configs` lists the names"
    raise FileNotFoundError(f"config {config!r} is neither a file nor the name of a config; {hint}")


def _similar(name: str, choices: Iterable[str]) -> list[str]:
    """Names that are close to this one as a whole, or in their last part."""
    last = {choice: choice.rpartition("/")[2] for choice in choices}
    whole = get_close_matches(name, last, n=3)
    parts = get_close_matches(name.rpartition("/")[2], set(last.values()), n=3)
    return [choice for choice in last if choice in whole or last[choice] in parts]


def describe(file: Path) -> str:
    """A config's first line, if it is a comment."""
    with file.open(encoding="utf-8") as stream:
        first = stream.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""


def listing(columns: int = 200) -> str:
    """The names of all configs with their first comment line, by where they are.

    Args:
        columns: width of the terminal; longer lines are wrapped.
    """
    choices, local = known(), names(LOCAL)
    width = max(map(len, choices), default=0)
    wrap = partial(textwrap.fill, width=columns, subsequent_indent=" " * (width + 4), break_on_hyphens=False)
    lines = []
    for title, chosen in ((f"In ./{LOCAL}", local), ("Packaged with upit", choices.keys() - local.keys())):
        rows = [wrap(f"  {name:{width}}  {describe(choices[name])}") for name in choices if name in chosen]
        lines += [f"{title}:", *rows, ""] if rows else []
    return "\n".join([*lines, "`upit fit -c NAME -c NAME` stacks them; `upit configs NAME` shows one."])


def copy(chosen: Sequence[str], target: Path) -> list[Path]:
    """Copy configs into a directory under their names: ``ablations/no_capacity`` keeps its folder.

    Args:
        chosen: names; none for all that come with upit.
        target: the directory, or, for a single config, a file that ends in ``.yaml``.
    Returns: the files written.
    Raises:
        FileNotFoundError: an unknown name.
        FileExistsError: a file exists already. Then nothing is copied.
        ValueError: several configs, but the target is one file.
    """
    sources = dict(_named(name) for name in chosen) or names(packaged())
    single = target.suffix == SUFFIX
    if single and len(sources) > 1:
        raise ValueError(f"--copy={str(target)!r} is one file, for {len(sources)} configs; name a directory")
    outputs = {target if single else target / f"{name}{SUFFIX}": file for name, file in sources.items()}
    taken = [str(output) for output in outputs if output.exists()]
    if taken:
        raise FileExistsError(f"nothing was copied: {', '.join(taken)} exists already")
    for output, file in outputs.items():
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, output)
    return list(outputs)


def show(chosen: Sequence[str]) -> str:
    """The text of configs, one after the other as YAML documents."""
    return "---\n".join(_named(name)[1].read_text(encoding="utf-8") for name in chosen)
