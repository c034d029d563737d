"""FZooS: federated minimization without gradients, with surrogates fitted to everything that was evaluated."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
