"""AutoNumerics-Zero: short programs that approximate a function, found by evolution."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
