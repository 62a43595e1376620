"""``upit fit``, ``validate``, ``test``, ``predict`` and ``data``. The only part of upit that knows lightning."""

import math
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upit.cli.parser import plain_parser


def check_config(args: Sequence[str]) -> None:
    """Exit with the parser's error where ``upit fit`` would not take these arguments."""
    from contextlib import redirect_stdout
    from io import StringIO

    try:
        with redirect_stdout(StringIO()):
            train(["fit", *args, "--print_config"])
    except SystemExit as stop:
        if stop.code:
            raise


def run_data(args: list[str]) -> None:
    """Prepare the data of a config for ``fit`` and show it. Builds neither the model nor the trainer."""
    if not args or {"-h", "--help"} & set(args):
        print(
            "usage: upit data -c CONFIG.yaml [--data.init_args.KEY VALUE ...]\n\n"
            "Prepare the data of a config for `upit fit`, and show it: examples, tokens, what is left out and why,\n"
            "steps an epoch, harvest points, and an example with its loss mask. Needs no GPU and no weights."
        )
        return
    train(["fit", *args], preview=True)


def _show_data(data: Any, config: Any, harvest: Any, upcycling: Any) -> None:
    """Prepare a data module and print what it holds.

    Args:
        config: of the trainer.
        harvest, upcycling: the callbacks, or None.
    """
    import numpy as np

    from upit.report.preview import print_data

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


def _swap_epoch(upcycling: Any, steps_per_epoch: int) -> list[float]:
    """Where the dense phase ends, in epochs; nothing without a swap."""
    if upcycling is None:
        return []
    return [upcycling.at_step / steps_per_epoch if upcycling.at_epoch is None else upcycling.at_epoch]


def train(args: list[str] | None, *, preview: bool = False) -> None:
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # checkpoints never run code
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lightning as L
    from jsonargparse import Namespace
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from yaml import SafeDumper

    from callbacks import ExpertHarvest, Upcycling, WriteAnswers
    from callbacks.event import MissedEventError
    from upit.cli.run_directory import RunDirectory

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
            parser_class=plain_parser(LightningArgumentParser),
            args=args,
        )


def _loggers(run: str) -> list:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    return [logger(save_dir=run, name="", version="") for logger in (TensorBoardLogger, CSVLogger)]
