"""LightningModules: the dense model, the MoE, and the one that passes from the first to the second in a fit."""

from lightning_modules.dense import DenseModule
from lightning_modules.moe import MoEModule
from lightning_modules.upit import UpITModule

__all__ = ["DenseModule", "MoEModule", "UpITModule"]
