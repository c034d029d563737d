"""The checks of ``check_strategy``, by subject; the order of the imports is the order of the checks."""

from . import constructor, agreement, state, features, runs  # noqa: F401, I001
from .subject import CHECKS as CHECKS
from .subject import Subject as Subject
