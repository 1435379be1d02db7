"""Who is asked is said, not seen from which tensor comes; and every form of clouds is as good.

No score depends on the identity of an object, so whatever copies inputs on the way (hooks, sharding
that casts) changes nothing; and modules are called, so that their hooks fire.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fad_loss import FeatureAdversarialLoss, ragged
from fad_loss.discriminators import Game, as_discriminator

from .cases import CLASSES, DISCRIMINATORS, LEARNING, STUDENT, TEACHER, gradients, make

B, N = 3, 9
LABELS = torch.arange(B) % CLASSES
# These compare all pairs of sets, which have to be dense.
DENSE_ONLY = {"match energy", "match chamfer"}
# In these a cloud is scored by what the others are.
TOGETHER = {name for name in DISCRIMINATORS if "match" in name}


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return as_discriminator(DISCRIMINATORS[name]()).double()


def clone_inputs(module: nn.Module, arguments: tuple) -> tuple:
    """A hook that hands on copies, as casting or sharding does."""

    def cloned(value):
        if isinstance(value, Game):
            sides = (value.student.map(Tensor.clone), value.teacher.map(Tensor.clone))
            return replace(value, student=sides[0], teacher=sides[1])
        return value.clone() if isinstance(value, Tensor) else value

    return tuple(cloned(value) for value in arguments)


def step(fad: FeatureAdversarialLoss, student: Tensor, teacher: Tensor, **options) -> list[Tensor]:
    """Value and all gradients of a training step."""
    leaf = student.detach().clone().requires_grad_()
    given = teacher.detach() if teacher is not student else leaf
    loss = fad(leaf, given, LABELS, **options)
    loss.backward()
    return [loss.detach(), leaf.grad, *gradients(fad).values()]


# ------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_copy_is_as_good_as_the_tensor(name):
    discriminator = build(name).eval()
    t = normal(B, N, TEACHER, seed=1)
    same = discriminator(Game.of(t, t, LABELS))
    copies = discriminator(Game.of(t.clone(), t.clone(), LABELS))
    for mine, other in zip(same, copies, strict=True):
        assert torch.equal(mine, other)
    # And points of both sides that are one object.
    game = Game.of(t, t, LABELS)
    one = discriminator(replace(game, teacher=game.student))
    for mine, other in zip(one, copies, strict=True):
        assert torch.equal(mine, other)
    for mine, side in zip(same, ("student", "teacher"), strict=True):
        torch.testing.assert_close(discriminator(game, side), mine)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_hooks_that_copy_change_nothing(name):
    plain = build(name).train()
    hooked = copy.deepcopy(plain)
    for module in hooked.modules():
        module.register_forward_pre_hook(clone_inputs)
    s, t = (normal(B, N, TEACHER, seed=seed).requires_grad_() for seed in (1, 2))
    results = []
    for discriminator in (plain, hooked):
        scores = discriminator(Game.of(s, t, LABELS))
        results.append([*scores, *torch.autograd.grad(scores.student.sum(), s)])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("same", [False, True])
def test_hooks_that_copy_change_nothing_in_the_loss(name, same):
    torch.manual_seed(0)
    student = normal(B, N, TEACHER, seed=1)
    teacher = student if same else normal(B, N, TEACHER, seed=2)
    plain = FeatureAdversarialLoss(TEACHER, TEACHER, discriminator=build(name)).double()
    hooked = copy.deepcopy(plain)
    for module in hooked.modules():
        module.register_forward_pre_hook(clone_inputs)
    for mine, other in zip(
        step(plain, student, teacher), step(hooked, student, teacher.clone()), strict=True
    ):
        # But in which order gradients are added up.
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


# ----------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("options", [{}, {"gradient_penalty": 1.0}, {"objective": "relativistic"}])
def test_forward_hooks_fire_in_both_terms(name, options):
    if "gradient_penalty" in options and name not in LEARNING:
        options = {"objective": "least_squares"}
    fad = make(name, **options)
    calls = []
    fad.discriminator.register_forward_hook(
        lambda _, arguments, scores: calls.append((arguments, scores))
    )
    parts = {"adapter": 0}
    for part, module in fad.named_modules():
        if part.startswith("discriminator.") and not isinstance(module, nn.ModuleList):
            module.register_forward_hook(
                lambda *_, part=part: parts.update({part: parts.get(part, 0) + 1})
            )
    student = normal(B, N, STUDENT, seed=1).requires_grad_()
    fad.student_loss(student, normal(B, N, TEACHER, seed=2), LABELS)
    assert len(calls) == 1
    # It stands still: the student's graph goes through, the parameters are none of it.
    asked, scores = calls[0]
    scored = scores if isinstance(scores, Tensor) else scores.student
    assert isinstance(asked[0], Game)
    assert scored.requires_grad
    calls.clear()
    fad(student, normal(B, N, TEACHER, seed=2), LABELS)
    sides = [arguments[1] if len(arguments) > 1 else None for arguments, _ in calls]
    if fad.discriminator.learns:
        assert sides[0] in {"student", None}  # the student's term
        assert None in sides[1:] or {"student", "teacher"} <= set(sides[1:])  # and the other
    else:
        assert sides == [None]  # one look is enough for both


def test_hooks_of_a_users_own_module_and_of_embeddings_fire():
    for name, part in (
        ("custom", "discriminator.module"),
        ("teacher embedding", "discriminator.embedding"),
        ("head", "discriminator.head"),
        ("point", "discriminator.first"),
    ):
        fad, calls = make(name), []
        fad.get_submodule(part).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        fad(normal(B, N, STUDENT, seed=1).requires_grad_(), normal(B, N, TEACHER, seed=2), LABELS)
        assert len(calls) >= 2, name


# ------------------------------------------------------------------------------- the same clouds


def uneven(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, and which of their points count."""
    student, teacher = normal(B, N, STUDENT, seed=1), 2 * normal(B, N, TEACHER, seed=2) + 1
    here = torch.rand(B, N, generator=torch.Generator().manual_seed(3)) < 0.6
    there = torch.rand(B, N, generator=torch.Generator().manual_seed(4)) < 0.6
    return student, teacher, here, here if corresponding(name) else there


def corresponding(name: str) -> bool:
    return as_discriminator(DISCRIMINATORS[name]()).corresponding


def losses(name: str, **options) -> FeatureAdversarialLoss:
    options.setdefault("normalize", True)
    return make(name, max_points=None, **options)


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("smallest", [None, 1, 0])
def test_masked_padded_and_ragged_clouds_agree(name, smallest):
    """In training: the statistics, the student's term and the discriminator's."""
    student, teacher, here, there = uneven(name)
    if smallest is not None:
        for mask in (here,) if corresponding(name) else (here, there):
            mask[1] = torch.arange(N) < smallest
    labels, results = LABELS, []
    for form in ("masked", "padded", "ragged")[: 2 if name in DENSE_ONLY else 3]:
        fad, leaf = losses(name), student.clone().requires_grad_()
        for _ in range(2):
            fad.zero_grad()
            leaf.grad = None
            if form == "ragged":
                mine, its = (
                    ragged(x[mask], lengths=mask.sum(1))
                    for x, mask in ((leaf, here), (teacher, there))
                )
                loss = fad(mine, its, labels)
            elif form == "masked":
                loss = fad(leaf, teacher, labels, mask=(here, there))
            else:
                # What lies behind is never looked at, not even to see whether it is a number.
                filling = torch.full((B, 4, 1), torch.nan, dtype=student.dtype)
                mine, its = (
                    torch.cat([x, filling.expand(-1, -1, x.shape[-1])], 1) for x in (leaf, teacher)
                )
                mask = [nn.functional.pad(x, (0, 4)) for x in (here, there)]
                loss = fad(mine, its, labels, mask=tuple(mask))
            loss.backward()
        statistics = fad.statistics()
        results.append([loss.detach(), leaf.grad, gradients(fad), statistics])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    assert not results[0][1][~here].any()
    assert results[0][1][here].any()
    small = smallest is not None and smallest < fad.discriminator.least_points
    assert results[0][3]["small_clouds"] == small


@pytest.mark.parametrize("name", [name for name in DISCRIMINATORS if name not in TOGETHER])
def test_they_agree_with_one_cloud_at_a_time(name):
    """In evaluation, where no statistics follow the batch."""
    student, teacher, here, there = uneven(name)
    fad = losses(name)
    fad(student.clone().requires_grad_(), teacher, LABELS, mask=(here, there))
    fad.eval()
    leaf = student.clone().requires_grad_()
    together = torch.stack(
        [
            term(leaf, teacher, LABELS, mask=(here, there))
            for term in (fad.student_loss, fad.discriminator_loss)
        ]
    )
    alone = torch.stack(
        [
            torch.stack(
                [
                    term(leaf[b : b + 1, here[b]], teacher[b : b + 1, there[b]], LABELS[b : b + 1])
                    for b in range(B)
                ]
            ).mean()
            for term in (fad.student_loss, fad.discriminator_loss)
        ]
    )
    torch.testing.assert_close(together, alone)
    mine, other = (torch.autograd.grad(x[0], leaf, retain_graph=True)[0] for x in (together, alone))
    torch.testing.assert_close(mine, other)
    assert mine[here].any()


@pytest.mark.parametrize("name", ["teacher", "witness", "paired"])
def test_masked_padded_and_ragged_clouds_with_positions_agree(name):
    student, teacher, here, there = uneven(name)
    places, others = normal(B, N, 3, seed=5), normal(B, N, 3, seed=6)
    results = []
    for form in ("masked", "ragged"):
        fad, leaf = losses(name).eval(), student.clone().requires_grad_()
        if form == "ragged" and name == "paired":
            # One cloud at a time, as the error says.
            terms = [
                fad(
                    leaf[b : b + 1, here[b]],
                    teacher[b : b + 1, there[b]],
                    positions=(places[b : b + 1, here[b]], others[b : b + 1, there[b]]),
                )
                for b in range(B)
            ]
            loss = torch.stack(terms).mean()
        elif form == "ragged":
            cut = [
                ragged(x[mask], lengths=mask.sum(1))
                for x, mask in ((leaf, here), (teacher, there), (places, here), (others, there))
            ]
            loss = fad(*cut[:2], positions=tuple(cut[2:]))
        else:
            loss = fad(leaf, teacher, mask=(here, there), positions=(places, others))
        loss.backward()
        results.append([loss.detach(), leaf.grad])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_ragged_clouds_that_are_drawn_train(name):
    """With the default number of points, or a smaller one: a static shape for any discriminator."""
    student, teacher, here, there = uneven(name)
    fad = make(name, max_points=4)
    leaf = student.requires_grad_()
    mine, its = (ragged(x[m], lengths=m.sum(1)) for x, m in ((leaf, here), (teacher, there)))
    loss = fad(mine, its, LABELS)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[here].any()


def test_ragged_clouds_with_positions_correspond_while_they_train():
    """Dense ones with a mask agree, where all points are drawn; the teacher's are interpolated."""
    student, teacher, here, there = uneven("paired")
    places, others = normal(B, N, 3, seed=5), normal(B, N, 3, seed=6)
    results = []
    for form in ("masked", "ragged"):
        fad, leaf = make("paired", max_points=N), student.clone().requires_grad_()
        if form == "masked":
            loss = fad(leaf, teacher, mask=(here, there), positions=(places, others))
        else:
            mine, its, at, around = (
                ragged(x[mask], lengths=mask.sum(1))
                for x, mask in ((leaf, here), (teacher, there), (places, here), (others, there))
            )
            loss = fad(mine, its, positions=(at, around))
        loss.backward()
        results.append([loss.detach(), leaf.grad])
    torch.testing.assert_close(*results)
