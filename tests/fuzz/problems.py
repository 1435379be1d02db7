"""What is drawn: clouds of every shape, dtype, layout, scale and structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fad_loss import ragged

FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = st.sampled_from([0, 1, 2, 3, 8, 30])
CHANNELS = st.sampled_from([1, 2, 3, 16, 17, 40, 64])
KINDS = ("normal", "clusters", "repeated", "copies", "lattice", "line", "outlier", "offset", "zero")
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(dtype: torch.dtype) -> float:
    """The relative spacing of the numbers in which results are computed."""
    return torch.finfo(wide(dtype)).eps


@dataclass
class Problem:
    """Two batches of clouds and how they are handed over."""

    x: Tensor
    y: Tensor
    lengths: tuple[list[int], list[int]] | None
    layout: str
    description: str
    generator: torch.Generator

    @property
    def clouds(self) -> list[tuple[slice, slice, int]]:
        """Where the clouds are: rows and columns of a packed or batched tensor, and the batch."""
        if self.lengths is None:
            return [(slice(None), slice(None), b) for b in range(self.x.shape[0])]
        found, i, j = [], 0, 0
        for n, m in zip(*self.lengths, strict=True):
            found.append((slice(i, i + n), slice(j, j + m), 0))
            i, j = i + n, j + m
        return found

    def given(self, t: Tensor, side: int, *, points: bool = True) -> Tensor:
        """A tensor along x (side 0) or y as the operation gets it: laid out, or ragged."""
        if self.lengths is not None:
            return ragged(t[0], lengths=self.lengths[side])
        if self.layout == "transposed" and points:
            return t.mT.contiguous().mT
        if self.layout == "strided" and t.shape[1]:
            return t.repeat_interleave(2, dim=1)[:, ::2]
        return t

    def taken(self, t: Tensor) -> Tensor:
        """A result of the operation, batched or packed into a batch of one."""
        return t.values().unsqueeze(0) if t.is_nested else t

    def random(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Numbers between 0 and 1."""
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64).to(dtype)


def _structured(kind: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    t = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind == "clusters":
        side = torch.rand(*shape[:-1], 1, generator=g, dtype=torch.float64) < 0.5
        t = torch.where(side, 1.0, -1.0) + t * 10 ** -float(1 + torch.rand(1, generator=g) * 4)
    elif kind == "repeated" and shape[1]:
        which = torch.randint(0, max(1, shape[1] // 3), (shape[1],), generator=g)
        t = t[:, which]
    elif kind == "lattice":
        t = t.mul(2).round()
    elif kind == "line":
        t = t[..., :1].expand(shape) + 0.0
    elif kind == "outlier" and shape[1]:
        t[:, 0] *= 1e4
    elif kind == "offset":
        t = t + 10 ** float(1 + torch.rand(1, generator=g) * 2)
    elif kind == "zero":
        t = torch.zeros(shape, dtype=torch.float64)
    return t


@st.composite
def problems(draw, same_size: bool = False, least: int = 0, extreme: bool = True) -> Problem:
    """Draw a problem; all randomness beyond its structure is in one seed."""
    seed = draw(st.integers(0, 2**40))
    dtype = draw(st.sampled_from(FLOATS))
    kind = draw(st.sampled_from(KINDS))
    sizes = SIZES.filter(lambda n: n >= least)
    B, N, C = draw(st.integers(1 if least else 0, 3)), draw(sizes), draw(CHANNELS)
    M = N if same_size else draw(sizes)
    half = dtype in {torch.bfloat16, torch.float16}
    exponents = [-2, -1, 0, 0, 1] if half or not extreme else [-30, -15, -6, -3, 0, 0, 0, 3, 6, 15]
    exponent = draw(st.sampled_from(exponents))
    layout = draw(st.sampled_from(LAYOUTS))
    is_ragged = draw(st.booleans()) and B > 0
    g = torch.Generator().manual_seed(seed)
    lengths = None
    if is_ragged:
        counts = [torch.randint(least, max(n, least) + 1, (B,), generator=g) for n in (N, M)]
        if same_size:
            counts[1] = counts[0]
        lengths = (counts[0].tolist(), counts[1].tolist())
        shapes = [(1, int(c.sum()), C) for c in counts]
    else:
        shapes = [(B, N, C), (B, M, C)]
    x = _structured(kind, shapes[0], g)
    if kind == "copies" and shapes[0][1] and shapes[1][1]:
        near = x[:, torch.randint(0, shapes[0][1], (shapes[1][1],), generator=g)]
        noise = 10 ** -float(torch.rand(1, generator=g) * 6)
        y = near + noise * torch.randn(shapes[1], generator=g, dtype=torch.float64)
    else:
        y = _structured(kind, shapes[1], g)
    # What half precision, and squared distances, can hold.
    largest = min(torch.finfo(dtype).max / 4, (torch.finfo(wide(dtype)).max / (20 * C)) ** 0.5)
    x, y = ((t * 10.0**exponent).clamp(-largest, largest).to(dtype) for t in (x, y))
    if layout == "expanded" and not is_ragged and B > 0:
        x = x[:1].expand_as(x)
    description = f"{kind} {dtype} {shapes} 1e{exponent} {layout} {lengths} seed {seed}"
    return Problem(x, y, lengths, layout, description, g)


def typical(x: Tensor, y: Tensor) -> float:
    """A squared distance between two points as they are scattered, at least 1e-30."""
    both = torch.cat([x.double().flatten(0, -2), y.double().flatten(0, -2)])
    if len(both) < 2:
        return 1.0
    return float(max(2 * both.var(0, unbiased=False).sum(), 1e-30))
