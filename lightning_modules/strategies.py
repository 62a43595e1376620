"""Which of Lightning's strategies the modules can train and score under."""

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

SUPPORTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)  # and no subclass: DeepSpeed's is one of DDP's


def check_strategy(trainer: L.Trainer) -> None:
    """Raises: ValueError: the trainer's strategy is another, or it splits tensors; names it and the alternatives."""
    strategy, devices = trainer.strategy, trainer.world_size
    sharded = (
        "lightning.pytorch.strategies.ModelParallelStrategy with "
        f"data_parallel_size={devices} and tensor_parallel_size=1 (FSDP2, configs/strategy/fsdp.yaml)"
    )
    if type(strategy) not in SUPPORTED:
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__} is not supported: the swap to a MoE is untested there. "
            f"Use {sharded}, strategy=ddp, or one device"
        )
    if isinstance(strategy, ModelParallelStrategy):
        split = strategy.device_mesh["tensor_parallel"].size()
        if split > 1:
            raise ValueError(
                f"trainer.strategy=ModelParallelStrategy has tensor_parallel_size={split}, but the models are sharded "
                f"over data-parallel processes only; the others would train apart. Use {sharded}, or strategy=ddp"
            )
