"""The command line, ``upit SUBCOMMAND``: which command runs. Imports no torch."""

import argparse
import shutil
import sys
from pathlib import Path

from upit.cli.fit import check_config, run_data, train
from upit.cli.own_modules import find_own_modules
from upit.cli.stages import STAGES, run_export, run_stage

SUBCOMMANDS = {
    "data": "prepare a config's data and show it: counts, what is left out, an example with its loss mask",
    "fit": "run the whole method, or one phase, from a YAML config",
    "validate": "held-out loss of a dense or MoE checkpoint",
    "test": "exact match per domain of a dense or MoE checkpoint",
    "predict": "answer the prompts of a JSONL file",
    "export": "write a checkpoint's model in stock transformers format",
    "expand": "make any number of experts from a few checkpoints",
    "upcycle": "assemble dense checkpoints into a MoE",
    "init-router": "initialise the router of a MoE, or of experts that are to become one",
    "inspect": "show what a run, a pool, a checkpoint or a model holds",
    "sweep": "run several configs over several seeds, and compare them",
    "report": "one HTML page about a run, or several side by side",
    "configs": "list, show or copy the configs that -c takes by name",
}


def main(args: list[str] | None = None) -> None:
    """Entry point. Imports torch only for the subcommands that need it."""
    given, args = args, sys.argv[1:] if args is None else args
    command = args[0] if args else "--help"
    try:
        find_own_modules()
    except ValueError as error:
        sys.exit(f"upit {command}: error: {error}")
    if command not in SUBCOMMANDS:
        _overview().parse_args(args or ["--help"])
    elif command == "export":
        run_export(args[1:])
    elif command in STAGES:
        run_stage(command, args[1:])
    elif command == "sweep":
        _sweep(args[1:])
    elif command == "report":
        _report(args[1:])
    elif command == "data":
        run_data(args[1:])
    elif command == "configs":
        _configs(args[1:])
    else:
        train(given)


def _overview() -> argparse.ArgumentParser:
    from upit import __version__

    lines = "\n".join(f"  {name:12} {text}" for name, text in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        "upit",
        description="Upcycle a dense language model into a Mixture-of-Experts during instruction tuning.",
        epilog=f"subcommands:\n{lines}\n\nupit SUBCOMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"upit {__version__}")
    parser.add_argument("subcommand", choices=list(SUBCOMMANDS), metavar="SUBCOMMAND")
    return parser


def _sweep(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "upit sweep",
        description="Run a base config, and others stacked on it, over several random seeds; each run is a process of "
        "its own. Finished runs are skipped and interrupted ones resumed, so the same command goes on after a stop.",
        epilog="Any other argument changes the base, as it would `upit fit`; a config has the last word.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        required=True,
        type=_config,
        help="base config, file or name; may be stacked",
    )
    parser.add_argument(
        "--configs", nargs="*", default=[], type=_config, help="configs to stack on the base, one at a time"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        default=[0, 1, 2],
        type=int,
        help="of weights from scratch, order of the data and upcycling; the data stays the same. Default: 0 1 2",
    )
    parser.add_argument("--jobs", default=1, type=int, help="runs at a time; default 1")
    parser.add_argument("--output", required=True, type=Path, help="directory of the sweep")
    options, extra = parser.parse_known_args(args)
    from upit.cli.sweep import plan, sweep

    if options.jobs < 1:
        parser.error(f"--jobs={options.jobs} must be at least 1")
    try:
        cells = plan(options.config, options.configs, options.seeds, options.output, extra=extra)
    except ValueError as error:
        parser.error(str(error))
    for arguments in dict.fromkeys(cell.arguments for cell in cells):
        check_config(arguments)
    if sweep(cells, options.output, jobs=options.jobs):
        sys.exit(1)


def _config(given: str) -> Path:
    from upit.cli.config_names import find

    try:
        return find(given)
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _report(args: list[str]) -> None:
    parser = argparse.ArgumentParser("upit report", description="Write one self-contained HTML page about runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run; several are shown side by side")
    parser.add_argument("--output", required=True, help="HTML file to write; an older one is replaced")
    options = parser.parse_args(args)
    from tqdm.auto import tqdm

    from upit.report.page import write_page

    try:
        output = write_page(options.runs, options.output, track=lambda tags: tqdm(tags, "Drawing", leave=False))
    except (OSError, ValueError) as error:  # FileError, of a damaged file, is a ValueError
        parser.error(str(error))
    print(f"Wrote {output}")


def _configs(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "upit configs",
        description="List the configs that `-c` takes by name. They are the YAML files in ./configs and the ones that "
        "come with upit; a config in ./configs goes before one of the same name that comes with upit.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="show these configs")
    parser.add_argument(
        "--copy", type=Path, metavar="DEST", help="copy them to this directory, or one of them to this .yaml file; "
        "without names, all that come with upit (`upit configs --copy configs`). Replaces nothing",
    )  # fmt: skip
    options = parser.parse_args(args)
    from upit.cli import config_names

    try:
        if options.copy:
            text = "\n".join(map(str, config_names.copy(options.names, options.copy)))
        elif options.names:
            text = config_names.show(options.names)
        else:
            text = config_names.listing(shutil.get_terminal_size((200, 24)).columns)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(text)


if __name__ == "__main__":
    main()
