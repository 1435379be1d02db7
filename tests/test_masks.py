"""Padded clouds with masks: distances, metrics and objectives see what counts, as in a loop."""

from __future__ import annotations

import pytest
import torch

from fad_loss import distances, metrics, objectives, ops, ragged

LENGTHS = (3, 7, 5)
DISTANCES = {
    "chamfer": distances.chamfer,
    "energy": distances.energy,
    "mmd": lambda x, y: distances.mmd(x, y, ops.Gaussian(1.0)),
    "sinkhorn": lambda x, y: distances.sinkhorn(x, y, 0.5),
}


def padded(seed, lengths=LENGTHS, channels=4):
    """Clouds whose padding, anywhere in them, is NaN; and which points count."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(lengths), 8, channels, generator=generator, dtype=torch.float64)
    order = torch.rand(len(lengths), 8, generator=generator).argsort(1)
    mask = order < torch.tensor(lengths).unsqueeze(1)
    return values.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_(), mask


@pytest.mark.parametrize("name", DISTANCES)
def test_distances(name):
    x, of_x = padded(0)
    y, of_y = padded(1, LENGTHS[::-1])
    value = DISTANCES[name](ragged(x, mask=of_x), ragged(y, mask=of_y))
    got = torch.autograd.grad(value, x)[0]
    loop = [
        DISTANCES[name](a[m][None], b[n][None]) for a, m, b, n in zip(x, of_x, y, of_y, strict=True)
    ]
    wanted = torch.stack(loop).mean()
    torch.testing.assert_close(value, wanted)
    # Sinkhorn's annealing begins at the diameter of all clouds together.
    atol = 1e-3 if name == "sinkhorn" else 1e-12
    torch.testing.assert_close(got, torch.autograd.grad(wanted, x)[0], rtol=0, atol=atol)
    assert (got[~of_x] == 0).all()


@pytest.mark.parametrize(
    "metric",
    [
        metrics.cka,
        metrics.information_lost,
        lambda x, y: metrics.neighbor_agreement(x, y, 1),
        lambda x, y: metrics.set_distances(x, y)["energy"],
    ],
)
def test_metrics(metric):
    x, of_x = padded(0)
    y, of_y = padded(1)
    got = metric(ragged(x, mask=of_x), ragged(y, mask=of_y))
    packed = [ragged(z[m], lengths=LENGTHS) for z, m in ((x, of_x), (y, of_y))]
    assert got == metric(*packed)
    assert got.isfinite()


@pytest.mark.parametrize("name", ["hinge", "non_saturating", "least_squares", "wasserstein"])
def test_objectives(name):
    objective = objectives.get_objective(name)
    fake, of_fake = padded(0)
    real, of_real = padded(1)
    fake, real = fake[..., 0], real[..., 0]
    masks = {"mask": (of_fake, of_real)}
    pairs = list(zip(fake, of_fake, real, of_real, strict=True))
    loop = [objective.student(s[m][None], t[n][None]) for s, m, t, n in pairs]
    torch.testing.assert_close(objective.student(fake, real, **masks), torch.stack(loop).mean())
    loop = [objective.discriminator(t[n][None], s[m][None]) for s, m, t, n in pairs]
    got = objective.discriminator(real, fake, **masks)
    torch.testing.assert_close(got, torch.stack(loop).mean())
