"""How far training has moved a model's expert parameters since an expert was harvested."""

import torch
from transformers import PreTrainedModel

from upit.core.distributed import all_sum
from upit.core.tensors import local, local_slices
from upit.model.families import is_expert
from upit.preparation.expert import Expert


@torch.no_grad()
def distance_from(model: PreTrainedModel, expert: Expert) -> float:
    """``||now - then|| / ||then||`` over all expert parameters; a collective, each rank reading its own shard.

    Args:
        expert: the parameters of then, on disk; one tensor of them is in memory at a time.
    """
    squares = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
    for name, param in model.named_parameters():
        if is_expert(name):
            now = local(param).float()
            then = expert.get_slice(name)[local_slices(param)].to(now)
            squares += torch.stack([(now - then).square().sum(), then.square().sum()])
    moved, size = all_sum(squares).sqrt().tolist()
    return moved / size
