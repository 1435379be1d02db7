r"""How much of what the teacher knows arrived in the student, and how much was lost on the way.

Nothing here has a gradient; these are numbers to report. They are never NaN: what a constant,
collapsed network scores is stated for each. Sums are taken in float64 (float32 where a device has
none), distances in the features' own precision.

**What is compared with what.** Features come as ``(n, C)``, one row per cloud (global features);
or per point, ``(B, N, C)`` or ragged. Point i of the student need not be point i of the teacher, so
features of points are first averaged over each cloud, and the clouds are what is compared. With
``paired=True`` the caller says that the points do correspond, one to one, and then every point
counts by itself. The two networks may differ in the number of channels, except for `set_distances`,
which measures distances from the one to the other.
"""

from __future__ import annotations

from fad_loss.metrics.sets import set_distances
from fad_loss.metrics.similarity import cka, information_lost, neighbor_agreement

__all__ = ["cka", "information_lost", "neighbor_agreement", "set_distances"]
