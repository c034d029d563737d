"""Statistics of the gradients of one batch, and the tests that choose a batch size from them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
