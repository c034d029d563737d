"""The plugin contract: named checks that any optimizer, scheduler, callback or strategy can be put through."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
