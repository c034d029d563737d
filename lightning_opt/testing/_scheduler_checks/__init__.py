"""The checks of ``check_scheduler``, by subject; the order of the imports is the order of the checks."""

from . import constructor, rates, state, trainer  # noqa: F401
from .subject import CHECKS as CHECKS
from .subject import Subject as Subject
