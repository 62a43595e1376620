"""Instruction data: tokenised once, masked to the responses, packed or grouped by length."""

from datamodules.instruction import InstructionDataModule
from datamodules.reasoning_gym import ReasoningGymDataModule

__all__ = ["InstructionDataModule", "ReasoningGymDataModule"]
