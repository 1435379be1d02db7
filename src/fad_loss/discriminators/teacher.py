"""The teacher's features as the discriminator: nothing to train, nothing that trails behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fad_loss import ops
from fad_loss._checks import look
from fad_loss._errors import choose, describe
from fad_loss._ragged import (
    cloud_lengths,
    cloud_mean,
    is_ragged,
    pack,
    per_point,
    pointwise,
    unpack,
)
from fad_loss.discriminators._layers import check_width, linear
from fad_loss.ops.kernels import Energy, Kernel, _positive

_MODES = {"log_ratio": False, "witness": True}
_NARROW, _NARROW_AND_WIDE = (0.1,), (0.3, 1.0, 3.0)


class TeacherDiscriminator(nn.Module):
    r"""Score points by how much likelier they are under the teacher's features than the student's.

    For densities p (teacher) and q (student) the optimal discriminator is :math:`\log p - \log q`.
    Both are estimated from the features of the cloud itself, with kernel densities over its teacher
    points :math:`t_j` and its student points :math:`s_i`:

    .. math::
        D(z) = \frac1{|m|} \sum_m \left[
            \log \frac1M \sum_j e^{-|z - t_j|^2 / 2 h_m^2}
          - \log \frac1N \sum_i e^{-|z - s_i|^2 / 2 h_m^2} \right],
        \qquad h_m^2 = m \cdot \frac1{M^2} \sum_{jk} |t_j - t_k|^2

    where a point is left out of its own estimate. The densities *are* the discriminator: the sets
    they are built from are detached, and only z carries a gradient, towards where the teacher has
    more points than the student. There are no parameters, so it never trails behind the student.

    ``condition="point"`` is for networks whose point i is the teacher's point i (no sampling layer
    lies between, or the same one). The teacher's density is then multiplied by a kernel around the
    point that belongs to z: the score gains the mean over m of :math:`-|z_i - t_i|^2 / 2 h_m^2`.
    Where the student's features are the teacher's, the gradients of both parts vanish.

    ``mode="witness"`` is the linear version, the witness function of the maximum mean discrepancy:
    :math:`D(z) = \frac1M \sum_j k(z, t_j) - \frac1N \sum_i k(z, s_i)`.

    Args:
        mode: "log_ratio" or "witness".
        bandwidths: the factors m, in units of the cloud's mean squared distance between teacher
            points; for "log_ratio". Wide ones see the whole set, narrow ones the nearest points.
            None, the default, takes one of 0.1, which made better students than the three of 0.3,
            1 and 3 and than narrower ones (``fad-sharp``, ``fad``, ``fad-near`` and ``fad-sharper``
            in ``examples/study/results/report.md``); with ``condition="point"``, where it made no
            difference (``fad-paired-narrow``, ``-wide``), those three.
        condition: None, or "point" if the points of student and teacher correspond; for
            "log_ratio".
        kernel: of `fad_loss.ops`, on features as they come; for "witness", where the default is
            `fad_loss.ops.Energy`, which pulls from any distance. Gaussian kernels push the points
            of a student that is far away apart more than they pull them near.
        embedding: a module that maps features before they are compared, trained by the
            discriminator's loss (as in MMD-GAN); or a width, for one linear layer of `channels`
            inputs with spectral norm.
        channels: of the features; only needed with ``embedding=`` a width.
        backend: see `fad_loss.ops`.

    Shape:
        features `(B, N, C)`, reference `(B, M, C)`, or ragged; scores `(B, N)`, or ragged.

    Raises:
        ValueError: an unknown mode or condition, bandwidths that are not positive, options of
            another mode, clouds with fewer than two points on either side, or clouds of different
            sizes where their points should correspond.

    Source: Lee and Wu, "Feature adversarial distillation for point cloud classification", ICIP 2023
    (arXiv:2306.14221), whose abstract names the teacher's features as the discriminator; reading
    them as a density ratio is ours. Witness: Gretton et al., JMLR 2012. Embedding: Li et al.,
    "MMD GAN", NeurIPS 2017.

    Example:
        >>> discriminator = TeacherDiscriminator()
        >>> teacher = torch.tensor([[[0.0], [1.0], [2.0]]])
        >>> student = torch.tensor([[[0.5], [1.5], [9.0], [9.5]]])
        >>> discriminator(student, reference=teacher) > 0
        tensor([[ True,  True, False, False]])
    """

    default_weight: float
    """From the tables of weights in ``examples/study/results/report.md``, of the default bandwidths
    and kernel; with others scores are of another scale. 30 for log-ratios (``fad-sharp``; 300 was
    the best with the wider bandwidths of ``fad``, whose pull is as strong then). 300 with
    ``condition="point"``, which was better than 100 over three seeds (``fad-paired-16points``). 3
    for "witness"; with the Gaussian kernels of ``fad-witness`` 300 was the best."""

    default_max_points: int
    """What ``max_points="auto"`` of the loss stands for. The cost grows with the square of it.

    64, whose gradient in a batch had a cosine of 0.92 with that of 256
    (``examples/study/results/gradients.json``), and fewer made worse students (``fad-16points`` in
    the tables, of wider bandwidths); with ``condition="point"`` 16 (0.84), which made better ones
    than 64, over three seeds on either split (``fad-paired-16points``)."""

    def __init__(
        self,
        *,
        mode: str = "log_ratio",
        bandwidths: Sequence[float] | None = None,
        condition: str | None = None,
        kernel: Kernel | None = None,
        embedding: nn.Module | int | None = None,
        channels: int | None = None,
        backend: str = "auto",
    ) -> None:
        """See the class."""
        super().__init__()
        self.witness = choose("mode", mode, _MODES)
        if kernel is not None and not self.witness:
            message = 'kernel: only mode="witness" takes a kernel; "log_ratio" takes bandwidths'
            raise ValueError(message)
        if kernel is not None and not isinstance(kernel, Kernel):
            message = (
                "kernel: expected Gaussian, Laplacian, Energy or InverseMultiquadric from "
                f"fad_loss.ops, got {describe(kernel)}"
            )
            raise TypeError(message)
        if condition not in {None, "point"}:
            message = f"condition: expected None or 'point', got {condition!r}"
            raise ValueError(message)
        if condition and self.witness:
            message = 'condition: only mode="log_ratio" takes one; set condition=None'
            raise ValueError(message)
        if bandwidths is None:
            bandwidths = _NARROW_AND_WIDE if condition else _NARROW
        if not isinstance(bandwidths, (tuple, list)):
            message = (
                f"bandwidths: expected several numbers, {_NARROW_AND_WIDE} say, got "
                f"{describe(bandwidths)}"
            )
            raise TypeError(message)
        self.mode, self.condition, self.backend = mode, condition, backend
        self.default_weight = 3.0 if self.witness else 300.0 if condition else 30.0
        self.default_max_points = 16 if condition else 64
        self.bandwidths = tuple(_positive("bandwidths", m) for m in bandwidths)
        if not self.bandwidths:
            message = "bandwidths: expected at least one number, got an empty sequence"
            raise ValueError(message)
        self.kernel = Energy() if kernel is None else kernel
        self.embedding = _embedding(embedding, channels)

    def extra_repr(self) -> str:
        """Shown by ``print(discriminator)``."""
        if self.witness:
            return repr(self.kernel)
        condition = f", condition={self.condition!r}" if self.condition else ""
        return f"bandwidths={self.bandwidths}{condition}"

    def forward(
        self,
        features: Tensor,
        reference: Tensor | None = None,
        labels: Tensor | None = None,  # noqa: ARG002
        student: Tensor | None = None,
    ) -> Tensor:
        """Score `features`.

        Args:
            features: the points z to score, `(B, N, C)` or ragged.
            reference: the teacher's features of the same clouds, `(B, M, C)` or ragged.
            labels: not used; every discriminator accepts them.
            student: the student's features, if `features` are not they. Pass the teacher's features
                as both `features` and `reference` to score real points.

        Returns:
            One score per point, `(B, N)` or ragged.

        Raises:
            ValueError: no reference, one of other clouds, or a cloud with fewer than two points.
        """
        if reference is None:
            message = (
                "reference: TeacherDiscriminator needs the teacher's features of the same clouds; "
                "call discriminator(features, reference=teacher_features)"
            )
            raise ValueError(message)
        of_teacher = features is reference
        for name, cloud in (("features", features), ("reference", reference), ("student", student)):
            if cloud is not None:
                _check_points(name, cloud)
                _check_clouds(name, cloud, features)
        t, place = self._place(reference)
        z = t if of_teacher and not features.requires_grad else place(self._embed(features))
        if student is not None:
            s = place(self._embed(student.detach()))
        else:
            s = z.detach() if self.embedding is None else place(self._embed(features.detach()))
        return self._scores(z, t, s, of_teacher=of_teacher, of_student=student is None)

    def both(self, features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the student's `features`, and of the teacher's, which carry no gradient.

        The same as from ``discriminator(features, reference=reference)`` and
        ``discriminator(reference, reference=reference, student=features)``, but what the two have
        in common is computed once.
        """
        for name, cloud in (("features", features), ("reference", reference)):
            _check_points(name, cloud)
            _check_clouds(name, cloud, features)
        t, place = self._place(reference)
        z = place(self._embed(features))
        s = z.detach()
        fake = self._scores(z, t, s, of_teacher=False, of_student=True)
        with torch.no_grad():
            real = self._scores(t, t, s, of_teacher=True, of_student=False)
        return fake, real

    def _place(self, reference: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The teacher's points as they are compared, and what makes others comparable to them."""
        t = self._embed(reference.detach())
        if self.witness:
            return t, lambda embedded: embedded
        where = _center_and_scale(t)
        return _placed(t, *where), lambda embedded: _placed(embedded, *where)

    def _scores(
        self, z: Tensor, t: Tensor, s: Tensor, *, of_teacher: bool, of_student: bool
    ) -> Tensor:
        """Of z, between the points of the teacher and the student, of which it may be one set."""
        if self.witness:
            near = ops.kernel_mean(z, t, self.kernel, exclude_self=of_teacher, backend=self.backend)
            own = ops.kernel_mean(z, s, self.kernel, exclude_self=of_student, backend=self.backend)
            return near - own
        near, own = self._log_density(z, t, of_teacher), self._log_density(z, s, of_student)
        ratio = near - own
        return ratio + self._log_likeness(z, t) if self.condition else ratio

    def _embed(self, features: Tensor) -> Tensor:
        return features if self.embedding is None else pointwise(self.embedding, features)

    def _log_density(self, z: Tensor, points: Tensor, own: bool) -> Tensor:
        """Log of the kernel density at z, averaged over the bandwidths, without its constant."""
        epsilon = [2 * m for m in self.bandwidths]
        minimum = ops.softmin(z, points, epsilon, exclude_self=own, backend=self.backend)
        scores = pointwise(lambda v: -(v / v.new_tensor(epsilon)).mean(-1), minimum)
        count = cloud_lengths(points).to(scores.dtype) - float(own)
        return scores - per_point(count.clamp_min(1).log(), z)

    def _log_likeness(self, z: Tensor, t: Tensor) -> Tensor:
        """Log of the kernel between each point of z and the teacher's point that belongs to it."""
        if is_ragged(z):
            (values, offsets), (others, bounds) = pack(z), pack(t)
            fits = values.shape == others.shape
            fits = fits and not (look(offsets) and not torch.equal(offsets, bounds))
        else:
            values, others = z, t
            fits = z.shape == t.shape
        if not fits:
            message = (
                'condition: "point" compares point i of the student with point i of the teacher, '
                f"got {describe(z)} and {describe(t)}; take layers before any sampling, or "
                "condition=None"
            )
            raise ValueError(message)
        wide = torch.promote_types(values.dtype, torch.float32)
        factor = sum(0.5 / m for m in self.bandwidths) / len(self.bandwidths)
        scores = -factor * (values.to(wide) - others.to(wide)).square().sum(-1)
        return unpack(scores, z) if is_ragged(z) else scores


def _embedding(embedding: nn.Module | int | None, channels: int | None) -> nn.Module | None:
    if embedding is None or isinstance(embedding, nn.Module):
        return embedding
    width: object = embedding
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        message = f"embedding: expected a module or a width of at least 1, got {embedding!r}"
        raise ValueError(message)
    if channels is None:
        message = (
            f"channels: embedding={embedding} makes a layer, and needs channels=, the width of the "
            "features, got None"
        )
        raise ValueError(message)
    check_width("channels", channels)
    return linear(channels, width, spectral_norm=True)


def _check_points(name: str, cloud: Tensor) -> None:
    if is_ragged(cloud):
        lengths = cloud_lengths(cloud)
        few = look(lengths) and bool((lengths < 2).any())
    else:
        few = cloud.dim() == 3 and cloud.shape[1] < 2
    if few:
        message = (
            f"{name}: TeacherDiscriminator estimates densities from the points of a cloud and "
            f"needs at least 2, got {describe(cloud)}; compare per-point features, or global "
            f"features (B, C) of at least 2 clouds"
        )
        raise ValueError(message)


def _check_clouds(name: str, cloud: Tensor, features: Tensor) -> None:
    if cloud.shape[0] != features.shape[0]:
        message = (
            f"{name}: expected the same clouds as features, got {describe(cloud)} for "
            f"{describe(features)}; feed both the same batch"
        )
        raise ValueError(message)
    if cloud.shape[-1] != features.shape[-1]:
        message = (
            f"{name}: expected the same number of channels C as features, got {describe(cloud)} "
            f"for {describe(features)}; map one to the channels of the other first"
        )
        raise ValueError(message)


def _center_and_scale(t: Tensor) -> tuple[Tensor, Tensor]:
    """Of each cloud, (B, C) and (B,): its mean, and the factor that makes its spread 1.

    The spread is the mean squared distance between its points: twice the variance, summed over C.
    Points that coincide but for rounding have none; their squared distance from the origin stands
    in, or 1: a cloud without spread must not outweigh all others.
    """
    wide = t.detach()
    wide = wide if wide.dtype == torch.float64 else wide.float()
    mean = cloud_mean(wide)
    centered = wide - per_point(mean, wide)
    norms = pointwise(lambda v: torch.linalg.vector_norm(v, dim=-1).square(), centered)
    spread, offset = 2 * cloud_mean(norms), mean.square().sum(-1)
    stand_in = torch.where(offset > 0, offset, 1.0)
    return mean, torch.where(spread > 1e-10 * offset, spread, stand_in).rsqrt()


def _placed(points: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    """Take each cloud's center away and multiply by its scale, keeping the dtype."""
    factor = scale.unsqueeze(-1)
    offset = per_point((-center * factor).to(points.dtype), points)
    factor = per_point(factor.to(points.dtype), points)
    if not is_ragged(points):
        return torch.addcmul(offset, points, factor)
    return unpack(torch.addcmul(pack(offset)[0], pack(points)[0], pack(factor)[0]), points)
