"""The stages on files from the command line: ``expand``, ``upcycle``, ``init-router``, ``inspect``, ``export``."""

import argparse
import inspect
import sys
from importlib import import_module

from upit.cli.parser import plain_parser

STAGES = {  # the module of upit.offline that has the function
    "expand": "expand_files",
    "init-router": "init_router",
    "upcycle": "upcycle_files",
    "inspect": "inspect",
}


def run_export(args: list[str]) -> None:
    parser = argparse.ArgumentParser("upit export", description="Write a checkpoint's model for stock transformers.")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a run, before or after the swap")
    parser.add_argument("--output", required=True, help="directory to write; must not hold anything yet")
    parser.add_argument("--tokenizer", help="its directory; default: tokenizer/ of the checkpoint's run")
    parser.add_argument(
        "--untie",
        action="store_true",
        help="write a head of its own where it is tied to the embedding; some clients need one, see docs/clients.md",
    )
    options = parser.parse_args(args)
    from upit.offline.export_checkpoint import export_checkpoint

    try:
        output = export_checkpoint(options.ckpt_path, options.output, tokenizer=options.tokenizer, untie=options.untie)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        parser.error(str(error))
    print(f"Exported to {output}")


def run_stage(command: str, args: list[str]) -> None:
    """Run a stage of :mod:`upit.offline`, its arguments given as flags or in a ``--config`` file."""
    stage = import_module(f"upit.offline.{STAGES[command]}")
    function = getattr(stage, command.replace("-", "_"))
    if not args or {"-h", "--help"} & set(args):
        defaults = {name: field.default for name, field in inspect.signature(function).parameters.items()}
        said = ", ".join(f"{name} {value}" for name, value in defaults.items() if value not in (inspect._empty, None))
        print(f"usage: upit {command} [--config FILE.yaml] [--KEY VALUE ...]\n\n{inspect.getdoc(function)}\n")
        print(
            f"Defaults: {said}. A list is '[A, B]'; a strategy its class's name, its arguments --KEY.ARGUMENT VALUE."
        )
        return
    from jsonargparse import ArgumentParser, auto_cli

    from upit.cli.errors import explain

    bare = [
        arg in ("--overwrite", "--untie") and after.startswith("--")
        for arg, after in zip(args, [*args[1:], "--"], strict=True)
    ]
    args = [f"{arg}=true" if alone else arg for arg, alone in zip(args, bare, strict=True)]
    settings = {"prog": f"upit {command}", "parser_mode": "yaml", "parser_class": plain_parser(ArgumentParser)}
    try:
        auto_cli(function, args=args, as_positional=command == "inspect", **settings)
    except (OSError, ValueError) as error:
        sys.exit(f"upit {command}: error: {explain(str(error))}")
