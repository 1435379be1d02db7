"""How errors are worded: the argument, what was expected, what came, and what to do about it.

A check is two lines: the condition, and ``raise expected(name, wanted, got, remedy)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def expected(
    name: str, wanted: str, got: object, remedy: str = "", *, error: type[Exception] = ValueError
) -> Exception:
    """The error to raise: ``name: expected wanted, got got; remedy``.

    `got` is described if it is not a string already.
    """
    came = got if isinstance(got, str) else describe(got)
    return error(f"{name}: expected {wanted}, got {came}" + (f"; {remedy}" if remedy else ""))


def describe(value: object) -> str:
    """``float32 of shape (2, 5, 3) on cpu``; of anything but a tensor its type and value."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r}"
    dtype = str(value.dtype).removeprefix("torch.")
    shape = "(" + ", ".join(str(size) for size in value.shape) + ")"
    kind = "ragged " if value.is_nested else ""
    return f"{kind}{dtype} of shape {shape} on {value.device}"


def choose(argument: str, name: str, table: Mapping[str, T]) -> T:
    """Return ``table[name]`` or raise a ValueError that lists what `argument` can be."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = get_close_matches(str(name), list(table), n=1)
    remedy = f"did you mean {near[0]!r}?" if near else ""
    raise expected(argument, f"one of {', '.join(map(repr, table))}", repr(name), remedy)


def count(name: str, value: object, least: int) -> int:
    """`value`, if it is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise expected(name, "an int", describe(value), error=TypeError)
    if value < least:
        raise expected(name, f"at least {least}", str(value))
    return value


def amount(name: str, value: object) -> float:
    """`value` as a float, if it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise expected(name, "a number", describe(value), error=TypeError)
    if not 0 <= value < float("inf"):
        raise expected(name, "a finite number of at least 0", repr(value))
    return float(value)


def switch(name: str, value: object, *others: str) -> bool:
    """`value`, if it is True or False; `others` are what else could have been said."""
    if not isinstance(value, bool):
        wanted = " or ".join(["True", "False", *others])
        raise expected(name, wanted, describe(value), error=TypeError)
    return value
