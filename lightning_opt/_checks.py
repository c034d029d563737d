"""Argument checks that answer with the name, the value and what is accepted."""

import difflib
from collections.abc import Iterable
from typing import Any

import torch


def check_interval(name: str, value: Any, low: float, high: float = float("inf"), *, closed: str = "[]") -> None:
    """Raise ``ValueError`` unless ``value`` is a number in the interval from ``low`` to ``high``.

    Args:
        name: What the user called it.
        value: A number or a one-element tensor. NaN is in no interval.
        low: Lower end.
        high: Upper end.
        closed: The brackets of the interval, for example ``"[)"``.

    Example:
        >>> check_interval("beta", 1.0, 0, 1, closed="[)")
        Traceback (most recent call last):
        ValueError: beta must be in [0, 1), got 1.0
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a one-element tensor, got one of shape {tuple(value.shape)}")
        value = value.item()
    above = value >= low if closed[0] == "[" else value > low
    below = value <= high if closed[1] == "]" else value < high
    if not (above and below) or value == float("inf"):
        if high == float("inf"):
            raise ValueError(f"{name} must be {'>=' if closed[0] == '[' else '>'} {low} and finite, got {value}")
        raise ValueError(f"{name} must be in {closed[0]}{low}, {high}{closed[1]}, got {value}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``; offer the nearest.

    Example:
        >>> check_choice("friction", "absolut", ["absolute", "relative"])
        Traceback (most recent call last):
        ValueError: friction must be one of 'absolute', 'relative'; got 'absolut'. Did you mean 'absolute'?
    """
    choices = list(choices)
    if value not in choices:
        near = nearest(str(value), map(str, choices))
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.{hint}")


def nearest(word: str, words: Iterable[str], count: int = 3) -> list[str]:
    """The words nearest to a misspelt one, best first, ignoring case; those much farther than the best are left out.

    Example:
        >>> nearest("adabelif", ["AdaBelief", "Lion"])
        ['AdaBelief']
    """
    by_lower = {w.lower(): w for w in words}
    found = difflib.get_close_matches(word.lower(), by_lower, count, cutoff=0.6)
    likeness = [difflib.SequenceMatcher(None, w, word.lower()).ratio() for w in found]
    return [by_lower[w] for w, ratio in zip(found, likeness, strict=True) if ratio > likeness[0] - 0.15]
