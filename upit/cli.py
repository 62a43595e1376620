"""The command line, ``upit SUBCOMMAND``. The only part of upit that knows lightning."""

import argparse
import inspect
import math
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upit.own_modules import find_own_modules

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
STAGES = ("expand", "init-router", "upcycle", "inspect")  # functions of upit.stages


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
        _export(args[1:])
    elif command in STAGES:
        _stage(command, args[1:])
    elif command == "sweep":
        _sweep(args[1:])
    elif command == "report":
        _report(args[1:])
    elif command == "data":
        _data(args[1:])
    elif command == "configs":
        _configs(args[1:])
    else:
        _train(given)


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


def _export(args: list[str]) -> None:
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
    from upit.export import export_checkpoint

    try:
        output = export_checkpoint(options.ckpt_path, options.output, tokenizer=options.tokenizer, untie=options.untie)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        parser.error(str(error))
    print(f"Exported to {output}")


def _stage(command: str, args: list[str]) -> None:
    """Run one of :mod:`upit.stages`, its arguments given as flags or in a ``--config`` file."""
    from upit import stages

    function = getattr(stages, command.replace("-", "_"))
    if not args or {"-h", "--help"} & set(args):
        defaults = {name: field.default for name, field in inspect.signature(function).parameters.items()}
        said = ", ".join(f"{name} {value}" for name, value in defaults.items() if value not in (inspect._empty, None))
        print(f"usage: upit {command} [--config FILE.yaml] [--KEY VALUE ...]\n\n{inspect.getdoc(function)}\n")
        print(
            f"Defaults: {said}. A list is '[A, B]'; a strategy its class's name, its arguments --KEY.ARGUMENT VALUE."
        )
        return
    from jsonargparse import ArgumentParser, auto_cli

    from upit.choices import explain

    bare = [
        arg in ("--overwrite", "--untie") and after.startswith("--")
        for arg, after in zip(args, [*args[1:], "--"], strict=True)
    ]
    args = [f"{arg}=true" if alone else arg for arg, alone in zip(args, bare, strict=True)]
    settings = {"prog": f"upit {command}", "parser_mode": "yaml", "parser_class": _plain(ArgumentParser)}
    try:
        auto_cli(function, args=args, as_positional=command == "inspect", **settings)
    except (OSError, ValueError) as error:
        sys.exit(f"upit {command}: error: {explain(str(error))}")


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
    from upit.sweep import plan, sweep

    if options.jobs < 1:
        parser.error(f"--jobs={options.jobs} must be at least 1")
    try:
        cells = plan(options.config, options.configs, options.seeds, options.output, extra=extra)
    except ValueError as error:
        parser.error(str(error))
    for arguments in dict.fromkeys(cell.arguments for cell in cells):
        _check_config(arguments)
    if sweep(cells, options.output, jobs=options.jobs):
        sys.exit(1)


def _config(given: str) -> Path:
    from upit.config_names import find

    try:
        return find(given)
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _check_config(args: Sequence[str]) -> None:
    """Exit with the parser's error where ``upit fit`` would not take these arguments."""
    from contextlib import redirect_stdout
    from io import StringIO

    try:
        with redirect_stdout(StringIO()):
            _train(["fit", *args, "--print_config"])
    except SystemExit as stop:
        if stop.code:
            raise


def _report(args: list[str]) -> None:
    parser = argparse.ArgumentParser("upit report", description="Write one self-contained HTML page about runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run; several are shown side by side")
    parser.add_argument("--output", required=True, help="HTML file to write; an older one is replaced")
    options = parser.parse_args(args)
    from tqdm.auto import tqdm

    from upit.page import write_page

    try:
        output = write_page(options.runs, options.output, track=lambda tags: tqdm(tags, "Drawing", leave=False))
    except (OSError, ValueError) as error:  # FileError, of a damaged file, is a ValueError
        parser.error(str(error))
    print(f"Wrote {output}")


def _data(args: list[str]) -> None:
    """Prepare the data of a config for ``fit`` and show it. Builds neither the model nor the trainer."""
    if not args or {"-h", "--help"} & set(args):
        print(
            "usage: upit data -c CONFIG.yaml [--data.init_args.KEY VALUE ...]\n\n"
            "Prepare the data of a config for `upit fit`, and show it: examples, tokens, what is left out and why,\n"
            "steps an epoch, harvest points, and an example with its loss mask. Needs no GPU and no weights."
        )
        return
    _train(["fit", *args], preview=True)


def _show_data(data: Any, config: Any, harvest: Any, upcycling: Any) -> None:
    """Prepare a data module and print what it holds.

    Args:
        config: of the trainer.
        harvest, upcycling: the callbacks, or None.
    """
    import numpy as np

    from upit.preview import print_data

    data.prepare_data()
    data.setup("fit")
    batches = len(data.train_dataloader())
    steps = -(-batches // (config.accumulate_grad_batches or 1))
    facts = [("steps an epoch", f"{steps:,} ({batches:,} batches of {data.batch_size} rows)")]
    bounds = [config.max_epochs or math.inf, config.max_steps / steps, *_swap_epoch(upcycling, steps)]
    epochs = min(bound for bound in (*bounds, math.inf) if bound > 0)
    if harvest is not None and math.isfinite(epochs):
        points = sorted(set(harvest.points(epochs, steps_per_epoch=steps)))
        facts.append(("harvest points", ", ".join(map(str, points))))
    parts = {name: data.stats[name] for name in ("train", "heldout")}
    names = data.train_set.domain_names
    counts = [
        np.bincount(part.domain_ids, minlength=len(names)).tolist() for part in (data.train_set, data.heldout_set)
    ]
    domains = dict(sorted(zip(names, zip(*counts, strict=True), strict=True)))
    facts.append(("chat template", data.template_name))
    facts.append(("cache", str(data.folder)))
    print_data(parts, facts=facts, domains=domains, example=data.train_set[0], tokenizer=data.tokenizer)


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
    from upit import config_names

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


def _swap_epoch(upcycling: Any, steps_per_epoch: int) -> list[float]:
    """Where the dense phase ends, in epochs; nothing without a swap."""
    if upcycling is None:
        return []
    return [upcycling.at_step / steps_per_epoch if upcycling.at_epoch is None else upcycling.at_epoch]


def _train(args: list[str] | None, *, preview: bool = False) -> None:
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # checkpoints never run code
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lightning as L
    from jsonargparse import Namespace
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from yaml import SafeDumper

    from callbacks import ExpertHarvest, Upcycling, WriteAnswers
    from callbacks.event import MissedEventError
    from upit.run_directory import RunDirectory

    class _Began(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            directory.began = True

    class CLI(LightningCLI):
        """LightningCLI whose runs each have a directory of their own, and whose two callbacks have a key each.

        A list of callbacks can only be replaced as a whole by a second config; ``harvest`` and ``upcycling`` can be
        changed line by line.
        """

        def _set_seed(self) -> None:
            try:
                super()._set_seed()
            except ValueError as error:
                self.parser.error(f"seed_everything: {error}")

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except ValueError as error:
                self.parser.error(str(error), error)

        def _parse_ckpt_path(self) -> None:
            """Lightning would replace the model section by the checkpoint's hyper_parameters; the module warns."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.set_defaults({"trainer.default_root_dir": "runs/run"})
            parser.add_lightning_class_args(ExpertHarvest, "harvest", subclass_mode=True, required=False)
            parser.add_lightning_class_args(Upcycling, "upcycling", subclass_mode=True, required=False)
            parser.add_argument(
                "--base",
                action="store_true",
                help="validate, test or predict with the model that training starts from, without a checkpoint",
            )

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            self._check_base(config.pop("base"), config.get("ckpt_path"))
            if config.get("ckpt_path") and not Path(config.ckpt_path).exists():
                self.parser.error(f"ckpt_path={config.ckpt_path!r} does not exist")
            wanted = config.trainer.default_root_dir
            try:
                run = directory.choose(Path(wanted), config.get("ckpt_path"), fits=self.subcommand == "fit")
            except OSError as error:
                self.parser.error(f"trainer.default_root_dir={str(wanted)!r} can't be written: {error}")
            except ValueError as error:
                self.parser.error(str(error))
            config.trainer.default_root_dir = str(run)

        def _check_base(self, base: bool, ckpt_path: str | None) -> None:
            if self.subcommand == "fit":
                if base:
                    self.parser.error("--base is for validate, test and predict")
            elif base and ckpt_path:
                self.parser.error("--base and --ckpt_path exclude one another")
            elif not base and not ckpt_path:
                self.parser.error(
                    "name the checkpoint with --ckpt_path; --base uses the model that training starts from instead"
                )

        def after_instantiate_classes(self) -> None:
            self.model.last_fit = True
            options = self.config_init[self.subcommand]
            if options.get("ckpt_path"):
                # told before the model is built, so that it is built as the checkpoint says, sharded too
                self.trainer.ckpt_path, options.ckpt_path = options.ckpt_path, None

        def _run_subcommand(self, subcommand: str) -> None:
            try:
                super()._run_subcommand(subcommand)
            except MissedEventError as error:
                sys.exit(f"upit {subcommand}: error: {error}")
            except SIGTERMException:  # Lightning would exit with 0
                sys.exit(128 + signal.SIGTERM)

        def _instantiate_trainer(self, config: dict[str, Any], callbacks: list) -> L.Trainer:
            fits = self.subcommand == "fit"
            if config["logger"] in (None, True):  # not written into the run's config: a second run has its own
                config["logger"] = _loggers(config["default_root_dir"]) if fits else False
            self.save_config_callback = SaveConfigCallback if fits else None  # a test leaves the run's config alone
            chosen = [callback for callback in callbacks if callback is not None]
            if fits:
                chosen.append(_Began())
            if self.subcommand == "predict":
                chosen.append(WriteAnswers())
            return super()._instantiate_trainer(config, chosen)

    class DataCLI(CLI):
        """Shows the data of a config for ``fit``."""

        def before_instantiate_classes(self) -> None:
            pass  # no run, and no directory for one

        def instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            wanted = {name: config.get(name) for name in ("data", "harvest", "upcycling")}
            parser = self._parser(self.subcommand)
            try:
                made = parser.instantiate_classes(Namespace(**{name: own for name, own in wanted.items() if own}))
                _show_data(made.data, config.trainer, made.get("harvest"), made.get("upcycling"))
            except (ValueError, OSError) as error:
                self.parser.error(str(error), error)

        def after_instantiate_classes(self) -> None:
            pass

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    if preview:
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    # members of a text enum, such as the default interval of Lightning's Timer
    SafeDumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str.__str__(text)))
    with RunDirectory() as directory:
        (DataCLI if preview else CLI)(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={name: {"parser_mode": "yaml"} for name in ("fit", "validate", "test", "predict")},
            parser_class=_plain(LightningArgumentParser),
            args=args,
        )


def _plain(kind: Any) -> Any:
    """A parser that takes configs by name. Its errors are without the usage of every option."""
    from jsonargparse import ActionConfigFile

    from upit.choices import explain
    from upit.config_names import ConfigByName

    class Parser(kind):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register("action", ActionConfigFile, ConfigByName)

        def error(self, message, ex=None):
            if not self.exit_on_error:  # a class's own arguments, parsed within: the error is told from outside
                super().error(message, ex)
            self.exit(2, f"{self.prog}: error: {explain(message)}\n")

    return Parser


def _loggers(run: str) -> list:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    return [logger(save_dir=run, name="", version="") for logger in (TensorBoardLogger, CSVLogger)]


if __name__ == "__main__":
    main()
