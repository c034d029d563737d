"""The checks of ``check_optimizer``, by subject; the order of the imports is the order of the checks."""

from . import constructor, updates, backends, kinds, state, training  # noqa: F401, I001
from .subject import CHECKS as CHECKS
from .subject import Subject as Subject
