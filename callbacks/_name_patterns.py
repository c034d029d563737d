"""Choosing parameters by patterns of their names."""

import fnmatch
from collections.abc import Sequence


def matches(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether a name is chosen: by one of the patterns, if there are any, and left out by none that begins with ``!``.

    Args:
        name: Such as ``net.0.weight``.
        patterns: As for :mod:`fnmatch`; None chooses every name.

    Example:
        >>> [matches("net.0.bias", patterns) for patterns in (None, ["net.*"], ["!*.bias"], ["net.*", "!*.bias"])]
        [True, True, False, False]
    """
    patterns = patterns or []
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return (not wanted or _fits(name, wanted)) and not _fits(name, unwanted)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
