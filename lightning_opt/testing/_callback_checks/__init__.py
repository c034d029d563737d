"""The checks of ``check_callback``, by subject; the order of the imports is the order of the checks."""

from . import constructor, state, trace, features, ownership, logs, failure  # noqa: F401, I001
from .subject import CHECKS as CHECKS
from .subject import Subject as Subject
