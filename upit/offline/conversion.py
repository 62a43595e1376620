"""Model upcycling on files: dense checkpoints in, a MoE checkpoint of stock transformers out, tensor by tensor.

A MoE's file keeps its experts apart, so each tensor of the output is one tensor of the input under another name, or a
router. Memory stays near one tensor, whatever the model. ``D`` layers, ``E`` experts, ``H`` hidden.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upit.core.files import Estimate, fresh_directory, write_json
from upit.core.prefetch import ahead
from upit.core.tensor_files import SHARD_BYTES, TensorFileError, TensorFiles, write_checkpoint
from upit.model.families import FAMILIES, FFN, Family, expert_name, is_expert
from upit.model.loading.configs import copy_tokenizer, make_portable, read_configs
from upit.preparation.compatibility import check_complete, check_config, check_same_vocabulary, check_shapes
from upit.preparation.expert import Expert

Read = Callable[[], Tensor]
Track = Callable[[Iterable[str]], Iterable[str]]


class Conversion:
    """A dense base and E experts on disk, checked against one another and ready to be written as a MoE.

    Args:
        base: checkpoint directory; gives config, tokenizer and every tensor that is no expert's.
        experts: see :func:`upit.preparation.sources.experts_at`.
        top_k: experts a token.
        dtype: of the output; default the base's.
        untie: write a head of its own where the base's is tied to the embedding.
    Raises: ValueError: unsupported architecture; top_k out of range; the base or an expert lacks a tensor; or, naming
        the file and the field or tensor, an expert's architecture, vocabulary, shapes or dtype are not the base's, or
        a file is broken.
    """

    def __init__(
        self,
        base: Path,
        experts: Sequence[Expert],
        *,
        top_k: int = 2,
        dtype: torch.dtype | None = None,
        untie: bool = False,
    ) -> None:
        self.directory = base
        checkpoints = [expert.file for expert in experts if expert.file.is_dir()]
        configs = read_configs(base, checkpoints, num_experts=len(experts), top_k=top_k)
        self.dense, self.moe = configs.dense, configs.moe
        self.family: Family = FAMILIES[self.dense.model_type]
        self.base = TensorFiles(base)
        self.shapes = self.family.dense_shapes(self.dense)
        check_complete(base, self.base, self.shapes)
        self.experts = list(experts)
        self.dtype = dtype or self.base[next(filter(is_expert, self.shapes))].dtype
        self._check(zip(checkpoints, configs.others, strict=True), any_dtype=dtype is not None)
        self.config = configs.moe_file | {"dtype": str(self.dtype).removeprefix("torch.")}
        self.untie = untie and self.dense.tie_word_embeddings
        if self.untie:
            self.config["tie_word_embeddings"] = False

    def _check(self, checkpoints: Iterable[tuple[Path, Any]], *, any_dtype: bool) -> None:
        """Raises: ValueError: an expert is not complete or does not fit the base."""
        for path, config in checkpoints:
            check_config(path, config, self.dense)
            check_same_vocabulary(self.directory, path)
        for expert in self.experts:
            check_shapes(expert, self.shapes)
            for name in expert.shapes:
                ours, theirs = self.base[name], expert.tensors[name]
                if theirs.dtype != ours.dtype and not any_dtype:
                    raise TensorFileError(
                        f"{theirs.file}: tensor {name!r} has dtype {theirs.dtype}, the base {ours.dtype}; "
                        "set dtype to convert"
                    )

    # --- what is written -----------------------------------------------------------------------------

    def plan(self, router_DEH: Tensor) -> dict[str, tuple[tuple[int, ...], Read]]:
        """Shape of every tensor of the output in the order of the file, and how to get it."""
        plan: dict[str, tuple[tuple[int, ...], Read]] = {}
        for name, shape in self.shapes.items():
            if not is_expert(name):
                plan[name] = shape, partial(self.base.read, name)
        if self.untie:
            embedding = "model.embed_tokens.weight"
            plan["lm_head.weight"] = self.shapes[embedding], partial(self.base.read, embedding)
        for layer, router_EH in enumerate(router_DEH):
            plan[self.family.router_in_file(layer)] = tuple(router_EH.shape), router_EH.clone
            for e, expert in enumerate(self.experts):
                for part in FFN:
                    name = expert_name(layer, part)
                    plan[self.family.expert_in_file(layer, e, part)] = (
                        self.shapes[name],
                        partial(expert.read, name),
                    )
            for part, tensor in self.family.shared_expert(self.moe).items():
                plan[f"model.layers.{layer}.{part}"] = tuple(tensor.shape), tensor.clone
        return plan

    def estimate(self) -> Estimate:
        """What :meth:`write` will take: the largest tensor, as read and as written, and the output's bytes."""
        shape = (self.dense.num_hidden_layers, len(self.experts), self.dense.hidden_size)
        sizes = [torch.Size(shape).numel() for shape, _ in self.plan(torch.empty(shape, device="meta")).values()]
        return Estimate(max(sizes) * (4 + self.dtype.itemsize), sum(sizes) * self.dtype.itemsize)

    def write(
        self,
        router_DEH: Tensor,
        output: Path,
        *,
        max_shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
        track: Track = lambda names: names,
    ) -> Path:
        """Write the MoE: weights, config, generation config, tokenizer and model card.

        Args:
            router_DEH: the routers' weights.
            output: a directory; appears only when complete.
            max_shard_bytes: of a weight file.
            overwrite: replace what is there.
            track: wraps the tensors' names, for a progress bar.
        Raises:
            FileExistsError: the output is not empty.
            TensorFileError: a tensor read holds NaN or infinity.
        """
        plan = self.plan(router_DEH)
        specs = {name: (self.dtype, shape) for name, (shape, _) in plan.items()}
        tensors = ahead(lambda name: (name, plan[name][1]().to(self.dtype)), track(plan))
        with fresh_directory(output, overwrite=overwrite) as directory:
            write_checkpoint(directory, tensors, specs, max_shard_bytes=max_shard_bytes)
            write_json(directory / "config.json", self.config)
            copy_tokenizer(self.directory, directory)
            make_portable(directory)
            (directory / "README.md").write_text(self._card(output.name))
        return output

    def _card(self, name: str) -> str:
        rows = "\n".join(f"| {e} | {expert.file} |" for e, expert in enumerate(self.experts))
        return (
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- upit\n- moe\n---\n\n"
            f"# {name}\n\nA {self.moe.model_type} causal language model ({len(self.experts)} experts, "
            f"top-{self.moe.num_experts_per_tok}), upcycled with upit from dense checkpoints "
            "([arXiv:2410.01610](https://arxiv.org/abs/2410.01610)).\n\n"
            f"## Experts\n\nAll other weights: {self.directory}\n\n| expert | source |\n|---|---|\n{rows}\n"
        )
