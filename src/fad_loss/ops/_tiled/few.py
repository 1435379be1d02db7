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

from fad_loss.ops._inputs import largest_square
from fad_loss.ops._precision import rounding_unit
from fad_loss.ops._tiled.tiles import DIRECT_CHANNELS, score_error

# Columns, up to which this is faster than folding them.
FEW_COLUMNS = 256
# Numbers that rows in doubt may read: more of them are better centered and screened again.
DOUBTFUL = 1 << 20
# How far the weights reach beyond the slack, and what sums of them may err by.
REACH, ROUNDING = 1.25, 2.0**-16


def nearest_of_few(x: Tensor, y: Tensor, distance: Tensor, index: Tensor) -> bool:
    """Fill squared distances and indices, (b, n, 1), or say that another way is better.

    Of (b, n, C) and (b, m, C). Of equal distances the lowest index is taken. Another way is better
    for values that are out of range, too.
    """
    (clouds, rows, channels), size = x.shape, y.shape[1]
    if x.device.type != "cpu" or size > FEW_COLUMNS or channels <= DIRECT_CHANNELS:
        return False
    x, y = x.to(distance.dtype), y.to(distance.dtype)
    # By roots and their squares, without memory for all squares; `score_error` has room for that.
    x_norms, y_norms = (torch.linalg.vector_norm(t, dim=-1).square_() for t in (x, y))
    norms = x_norms + y_norms.amax(-1, keepdim=True)
    if not norms.amax().item() <= largest_square(x) / 2:
        return False
    scores = torch.baddbmm(y_norms.unsqueeze(1), x, y.mT, alpha=-2)
    least = scores.amin(-1)
    # Beyond twice the error of a score. Products of tiny numbers underflow: an error of its own.
    share = REACH * 2 * score_error(channels) * rounding_unit(x)
    reach = least.add(norms.add_(REACH * torch.finfo(x.dtype).tiny / share), alpha=share)
    weights = torch.sub(reach.unsqueeze(-1), scores, out=scores).clamp_(min=0).view(-1, size)
    total, own = weights.sum(-1), reach.sub_(least).view(-1)
    # Rounded to the next column: half more than the mean of those that are left, cut off.
    columns = torch.arange(0.5, size, dtype=x.dtype)
    index.view(-1).copy_(weights.mv(columns).div_(total))
    points, queries = y.reshape(-1, channels), x.reshape(-1, channels)
    first = torch.arange(0, clouds * size, size).view(-1, 1, 1)
    chosen = points.index_select(0, (index + first).view(-1))
    torch.sum(chosen.sub_(queries).square_(), -1, out=distance.view(-1))
    certain = total <= own.mul_(1 + ROUNDING)
    if not certain.all():
        doubtful = certain.logical_not_().nonzero().squeeze(-1)
        if len(doubtful) * size * channels > DOUBTFUL:
            return False
        exact = (y[doubtful // rows] - queries[doubtful].unsqueeze(1)).square_().sum(-1)
        nearest = exact.amin(-1, keepdim=True).nan_to_num_(torch.inf, torch.inf)
        lowest = torch.where(exact == nearest, torch.arange(size), size - 1).amin(-1)
        distance.view(-1)[doubtful] = nearest.squeeze(-1)
        index.view(-1)[doubtful] = lowest.masked_fill_(nearest.squeeze(-1) == torch.inf, -1)
    return True
