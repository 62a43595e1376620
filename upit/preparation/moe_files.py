"""A Mixture-of-Experts checkpoint of stock transformers on disk: its routers, and its experts one by one."""

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from upit.core.files import Estimate, digest, fresh_directory
from upit.core.tensor_files import TensorFiles, write_checkpoint
from upit.model.families import FFN, MOE_TYPES, expert_name, family_of_moe, is_expert
from upit.model.loading.configs import copy_tokenizer, make_portable
from upit.preparation.compatibility import check_complete
from upit.preparation.expert import Expert

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")  # files that hold the old router
Track = Callable[[Iterable[str]], Iterable[str]]


class MoEFiles:
    """A MoE's directory.

    Args:
        directory: as ``save_pretrained`` and ``upit upcycle`` write it.
    Raises: ValueError: it is not a MoE of a supported family, or a weight is missing or has another shape than
        config.json says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if self.config.model_type not in MOE_TYPES:
            raise ValueError(
                f"{str(directory)!r} is a {self.config.model_type!r}, no MoE; supported: {sorted(MOE_TYPES)}"
            )
        self.family = family_of_moe(self.config)
        self.files = TensorFiles(directory)
        self.num_experts: int = self.config.num_experts
        self.num_layers: int = self.config.num_hidden_layers
        check_complete(directory, self.files, self._shapes())

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its name in the files."""
        dense = self.family.dense_shapes(self.config)
        shapes = {name: shape for name, shape in dense.items() if not is_expert(name)}
        with torch.device("meta"):
            shared = self.family.shared_expert(self.config)
        for layer in range(self.num_layers):
            shapes[self.family.router_in_file(layer)] = (self.num_experts, self.config.hidden_size)
            shapes |= {f"model.layers.{layer}.{name}": tuple(tensor.shape) for name, tensor in shared.items()}
            for part in FFN:
                shape = dense[expert_name(layer, part)]
                shapes |= {self.family.expert_in_file(layer, e, part): shape for e in range(self.num_experts)}
        return shapes

    def router(self, layer: int) -> Tensor:
        """A layer's gate, (E, H)."""
        return self.files.read(self.family.router_in_file(layer))

    def expert(self, e: int) -> Expert:
        """One expert, its tensors named as in the dense state dict."""
        names = {
            expert_name(layer, part): self.family.expert_in_file(layer, e, part)
            for layer in range(self.num_layers)
            for part in FFN
        }
        dtype = str(self.files.renamed(names)[expert_name(0, FFN[0])].dtype).removeprefix("torch.")
        origin = {"kind": "checkpoint", "path": f"{self.directory} (expert {e})"}
        return Expert(self.directory, digest([self.files.stamp, e]), dtype, origin=origin, names=names)

    def estimate(self) -> Estimate:
        """What :meth:`write_with` will take: the largest tensor, as read and as written, and the output's bytes."""
        sizes = [math.prod(entry.shape) * entry.dtype.itemsize for entry in self.files.values()]
        return Estimate(2 * max(sizes), sum(sizes))

    def write_with(
        self,
        experts: Sequence[Expert],
        router_DEH: Tensor,
        output: Path,
        *,
        overwrite: bool = False,
        track: Track = lambda names: names,
    ) -> None:
        """Write the MoE again, with other routers and experts.

        Args:
            output: a directory; appears only when complete.
            overwrite: replace what is there.
            track: wraps the tensors' names, for a progress bar.
        Raises: FileExistsError: the output is not empty.
        """
        reads = {name: partial(self.files.read, name) for name in self.files}
        for layer, router_EH in enumerate(router_DEH):
            reads[self.family.router_in_file(layer)] = router_EH.clone
            for e, expert in enumerate(experts):
                for part in FFN:
                    name = self.family.expert_in_file(layer, e, part)
                    reads[name] = partial(expert.read, expert_name(layer, part))
        specs = {name: (entry.dtype, entry.shape) for name, entry in self.files.items()}
        tensors = ((name, reads[name]().to(specs[name][0])) for name in track(specs))
        with fresh_directory(output, overwrite=overwrite) as directory:
            write_checkpoint(directory, tensors, specs)
            for file in self.directory.iterdir():
                if file.is_file() and not any(kind in file.name for kind in WEIGHTS):
                    shutil.copy(file, directory / file.name)
            copy_tokenizer(self.directory, directory)
            make_portable(directory)
