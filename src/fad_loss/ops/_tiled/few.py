"""nearest among few points, on a CPU: in as few passes as torch.cdist, and exact.

The product of all pairs screens, as in `search`; but which column a row's smallest score has is
found by arithmetic, which vectorises, as neither a search for an index nor a comparison does: of
weights that fall from the smallest score to 0 a little beyond the error of the scores, only one is
left in most rows, and the mean of the columns under the weights is its column. The few rows with
more than one are decided by all their exact distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fad_loss.ops._dense import accumulation_dtype
from fad_loss.ops._precision import rounding_unit
from fad_loss.ops._tiled.tiles import DIRECT_CHANNELS, score_error

# Columns, up to which this is faster than folding them.
FEW_COLUMNS = 256
# Numbers that rows in doubt may read: more of them are better centered and screened again.
DOUBTFUL = 1 << 20
# How far the weights reach beyond the slack, and what sums of them may err by.
REACH, ROUNDING = 1.25, 2.0**-16


def fits(y: Tensor) -> bool:
    """Whether there are few enough columns, of enough channels for a product."""
    return y.device.type == "cpu" and y.shape[1] <= FEW_COLUMNS and y.shape[2] > DIRECT_CHANNELS


def nearest_of_few(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """Squared distances and indices, (b, n), or None if too many rows are in doubt.

    Of (b, n, C) and (b, m, C), m at least 1. Of equal distances the lowest index is taken.
    """
    x, y = (t.to(accumulation_dtype(t.dtype)) for t in (x, y))
    (clouds, rows, channels), size = x.shape, y.shape[1]
    x_norms, y_norms = torch.linalg.vecdot(x, x), torch.linalg.vecdot(y, y)
    scores = torch.baddbmm(y_norms.unsqueeze(1), x, y.mT, alpha=-2)
    least = scores.amin(-1)
    # Twice the error of a score. Products of tiny numbers underflow: an error of its own.
    slack = x_norms.add_(y_norms.amax(1, keepdim=True))
    slack.mul_(2 * score_error(channels) * rounding_unit(x)).add_(torch.finfo(x.dtype).tiny)
    reach = least.add(slack, alpha=REACH)
    weights = torch.sub(reach.unsqueeze(-1), scores).clamp_(min=0).view(-1, size)
    columns = torch.arange(size)
    total = weights.sum(-1)
    index = weights.mv(columns.to(x.dtype)).div_(total).round_().nan_to_num_(0.0).long()
    own = reach.sub_(least).view(-1).mul_(1 + ROUNDING)
    doubtful = (total <= own).logical_not_().nonzero().squeeze(-1)
    if len(doubtful) * size * channels > DOUBTFUL:
        return None
    points, queries = y.reshape(-1, channels), x.reshape(-1, channels)
    first = torch.arange(0, clouds * size, size).unsqueeze(-1)
    chosen = (index.view(clouds, rows) + first).view(-1)
    distance = points.index_select(0, chosen).sub_(queries).square_().sum(-1)
    if len(doubtful):
        others = y[doubtful // rows] - queries[doubtful].unsqueeze(1)
        exact = others.square_().sum(-1)
        nearest = exact.amin(-1, keepdim=True)
        distance[doubtful] = nearest.squeeze(-1).nan_to_num_(torch.inf)
        index[doubtful] = torch.where(exact == nearest, columns, size - 1).amin(-1)
    return distance.view(clouds, rows), index.view(clouds, rows)
