"""When to act in a fit: harvest experts, upcycle, report, show."""

from callbacks.answers import WriteAnswers
from callbacks.collapse_guard import CollapseGuard
from callbacks.growth import ExpertGrowth
from callbacks.harvest import ExpertHarvest
from callbacks.hparams import HParams
from callbacks.pictures.base import LineagePicture, SeedDataPicture
from callbacks.pictures.pilot import DiversityPicture, PilotPicture
from callbacks.pictures.routing import RoutingPicture
from callbacks.pictures.swap import CurvesPicture, SwapPicture
from callbacks.report import RunReport
from callbacks.upcycling import Upcycling

__all__ = [
    "CollapseGuard",
    "CurvesPicture",
    "DiversityPicture",
    "ExpertGrowth",
    "ExpertHarvest",
    "HParams",
    "LineagePicture",
    "PilotPicture",
    "RoutingPicture",
    "RunReport",
    "SeedDataPicture",
    "SwapPicture",
    "Upcycling",
    "WriteAnswers",
]
