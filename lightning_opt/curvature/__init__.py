"""Matrix-free curvature of a model's loss, and what follows from it for learning rate, momentum and stability."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
