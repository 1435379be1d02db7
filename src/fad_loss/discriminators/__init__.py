"""Modules that score features: the higher the score, the more they are taken for the teacher's.

All are called as ``discriminator(features, reference=..., labels=...)`` with features `(B, N, C)`
or ragged, and return one score per point, `(B, N)` or ragged, or one per cloud, `(B,)`.
"""

from fad_loss.discriminators.cloud import CloudDiscriminator
from fad_loss.discriminators.head import HeadDiscriminator
from fad_loss.discriminators.match import MatchDiscriminator
from fad_loss.discriminators.neighborhood import NeighborhoodDiscriminator
from fad_loss.discriminators.point import PointDiscriminator
from fad_loss.discriminators.teacher import TeacherDiscriminator

__all__ = [
    "CloudDiscriminator",
    "HeadDiscriminator",
    "MatchDiscriminator",
    "NeighborhoodDiscriminator",
    "PointDiscriminator",
    "TeacherDiscriminator",
]
