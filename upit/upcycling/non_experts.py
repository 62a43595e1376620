"""Where the MoE's attention, norms and embeddings come from; the paper leaves it open."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from upit.core.choice import Strategy
from upit.core.distributed import all_sum
from upit.core.tensor_files import TensorFileError, TensorFiles, open_tensors
from upit.core.tensors import local, local_slices
from upit.model.families import is_expert
from upit.model.loading.sources import loading
from upit.model.sharding import reshard
from upit.preparation.compatibility import check_config
from upit.preparation.expert import Expert, Rows


class NonExperts(Strategy):
    """Gives the MoE every parameter that is no expert's."""

    of_pool = False  # whether the pool's experts must come with their other parameters
    overwrites = True  # whether fill changes the dense model at all

    def check(self, dense: PreTrainedModel) -> None:
        """Raises: ValueError: what would fail at the swap; called before the run, with the dense model's outline."""
        return

    @abstractmethod
    def fill(self, dense: PreTrainedModel, pool: Sequence[Expert]) -> None:
        """Overwrite the dense model's non-expert parameters, each rank its own shard.

        Args:
            dense: borrowed with all its parameters, see :func:`upit.preparation.placement.borrowed`.
            pool: the experts that expansion starts from.
        """


@torch.no_grad()
def check_filled(choice: NonExperts, dense: PreTrainedModel) -> None:
    """Check what :meth:`NonExperts.fill` left in the dense model; a collective.

    Raises: ValueError: a parameter that is no expert's holds NaN or infinity; names the class and the parameters.
    """
    params = {name: local(param) for name, param in dense.named_parameters() if not is_expert(name)}
    broken = all_sum(torch.stack([(~param.isfinite()).any() for param in params.values()]).int()).tolist()
    names = [name for name, count in zip(params, broken, strict=True) if count]
    if names:
        raise ValueError(f"{choice.class_path} left NaN or infinity in {len(names)} parameters, such as {names[0]!r}")


@torch.no_grad()
def _overwrite(dense: PreTrainedModel, value: Callable[[str, tuple[slice, ...]], Tensor]) -> None:
    reshard(dense)
    for name, param in dense.named_parameters():
        if not is_expert(name):
            target = local(param)
            target.copy_(value(name, local_slices(param)).to(target.device))


def _rest_of(expert: Expert) -> Path:
    if expert.rest is None:
        raise TensorFileError(
            f"{str(expert.file)!r} was harvested without the parameters that are no expert's; there is no mean of them"
        )
    return expert.rest


class LastNonExperts(NonExperts):
    """Of the dense model at the swap; default ours."""

    overwrites = False

    def fill(self, dense, pool):
        pass


class MeanNonExperts(NonExperts):
    """The mean over the pool, as in Branch-Train-MiX (arXiv:2403.07816); the harvest then stores them too."""

    of_pool = True

    def fill(self, dense, pool):
        sources = [TensorFiles(_rest_of(expert)) for expert in pool]

        def mean(name: str, where: tuple[slice, ...]) -> Tensor:
            return torch.stack([Rows(source, name)[where].float() for source in sources]).mean(0)

        _overwrite(dense, mean)


class NamedNonExperts(NonExperts):
    """Of a checkpoint on disk.

    Args:
        path: transformers directory with safetensors, of the dense model's architecture or of a MoE made from it.
    Raises: ValueError: it holds no weights that can be read.
    """

    def __init__(self, path: str) -> None:
        open_tensors(path, "NamedNonExperts.path")
        self.path = path

    def check(self, dense):
        source = open_tensors(self.path, "NamedNonExperts.path")
        for name, param in dense.named_parameters():
            found = source[name].shape if name in source else None
            if not is_expert(name) and found != tuple(param.shape):
                raise ValueError(
                    f"NamedNonExperts.path={self.path!r}: tensor {name!r} has shape {found}, the dense model's has "
                    f"{tuple(param.shape)}; name a checkpoint of its architecture and vocabulary"
                )
        with loading("NamedNonExperts.path", self.path):
            own = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
            check_config(Path(self.path), own, dense.config, moe=True)

    def fill(self, dense, pool):
        self.check(dense)
        source = TensorFiles(Path(self.path))
        _overwrite(dense, lambda name, where: Rows(source, name)[where])
