"""Published optimization research as PyTorch Lightning plugins.

The package imports its parts lazily: ``import lightning_opt`` costs nothing beyond this file.
Start at :mod:`lightning_opt.optim`, :mod:`lightning_opt.callbacks`, or the ``lightning-opt`` command.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
