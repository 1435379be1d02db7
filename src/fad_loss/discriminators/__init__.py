"""Modules that score the points of a game: the higher, the more they are taken for the teacher's.

All are called as ``discriminator(game, side)`` with a `Game` of both players' points, and return
one score per point, ``(B, N)`` or ragged, or one per cloud, ``(B,)``; without a side, of both.
"""

from fad_loss._game import Game
from fad_loss._points import Points
from fad_loss.discriminators.base import Discriminator, Scores, as_discriminator
from fad_loss.discriminators.density import TeacherDiscriminator
from fad_loss.discriminators.head import HeadDiscriminator
from fad_loss.discriminators.learned.cloud import CloudDiscriminator
from fad_loss.discriminators.learned.neighborhood import NeighborhoodDiscriminator
from fad_loss.discriminators.learned.point import PointDiscriminator
from fad_loss.discriminators.match import MatchDiscriminator

__all__ = [
    "CloudDiscriminator",
    "Discriminator",
    "Game",
    "HeadDiscriminator",
    "MatchDiscriminator",
    "NeighborhoodDiscriminator",
    "PointDiscriminator",
    "Points",
    "Scores",
    "TeacherDiscriminator",
    "as_discriminator",
]
