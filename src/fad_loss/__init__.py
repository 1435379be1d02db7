"""Feature adversarial distillation for point clouds.

>>> import torch
>>> from fad_loss import FeatureAdversarialLoss
>>> fad = FeatureAdversarialLoss(student_channels=64, teacher_channels=1024)
"""

from fad_loss import distances, metrics, objectives, ops, penalties
from fad_loss._checks import debug
from fad_loss.capture import capture_features
from fad_loss.correspondence import interpolate
from fad_loss.discriminators import (
    CloudDiscriminator,
    HeadDiscriminator,
    MatchDiscriminator,
    NeighborhoodDiscriminator,
    PointDiscriminator,
    TeacherDiscriminator,
)
from fad_loss.distiller import Distiller
from fad_loss.loss import FeatureAdversarialLoss
from fad_loss.ragged import ragged

__all__ = [
    "CloudDiscriminator",
    "Distiller",
    "FeatureAdversarialLoss",
    "HeadDiscriminator",
    "MatchDiscriminator",
    "NeighborhoodDiscriminator",
    "PointDiscriminator",
    "TeacherDiscriminator",
    "capture_features",
    "debug",
    "distances",
    "interpolate",
    "metrics",
    "objectives",
    "ops",
    "penalties",
    "ragged",
]
__version__ = "0.2.0"
