r"""Distances between two sets of points, differentiable, one per cloud.

They compare features as sets: no order, no correspondence, any number of points on either side. All
are built on `fad_loss.ops`, so none holds an N x M matrix.
"""

from __future__ import annotations

from fad_loss.distances.moments import chamfer, energy, mmd
from fad_loss.distances.sinkhorn import sinkhorn

__all__ = ["chamfer", "energy", "mmd", "sinkhorn"]
