"""A class under a contract, and what is expected of each check of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from lightning_opt.testing import ContractError, NotApplicable


@dataclasses.dataclass(frozen=True)
class Case:
    """A class, its settings, and what is known of it beforehand.

    Attributes:
        cls: An optimizer, a scheduler, a callback or a strategy.
        kwargs: Its arguments.
        not_applicable: Checks of what it does not do, or refuses.
        failures: Promises that it breaks: the check, and what the check must find.
    """

    cls: Any
    kwargs: dict[str, Any]
    not_applicable: frozenset[str] = frozenset()
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    def expect(self, check: str, run: Callable[[], None], excuse: str | None = None) -> None:
        """Run a check: it must pass, unless it is known that it fails or does not apply.

        Args:
            check: Its name.
            run: The check.
            excuse: A reason for which it need not apply, without being listed.
        """
        if check in self.failures:
            with pytest.raises(ContractError, match=self.failures[check]):
                run()
        elif check in self.not_applicable:
            with pytest.raises(NotApplicable):
                run()
        else:
            try:
                run()
            except NotApplicable as reason:
                if excuse is None or excuse not in str(reason):
                    pytest.fail(f"not applicable: {reason}")
