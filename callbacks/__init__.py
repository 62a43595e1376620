"""When to act in a fit: harvest experts, upcycle, report."""

from callbacks.answers import WriteAnswers
from callbacks.harvest import ExpertHarvest
from callbacks.report import RunReport
from callbacks.upcycling import Upcycling

__all__ = ["ExpertHarvest", "RunReport", "Upcycling", "WriteAnswers"]
