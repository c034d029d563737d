"""Published optimization research as PyTorch Lightning plugins.

The package imports its parts lazily. ``import lightning_opt`` does one thing: it lets the short names of
:mod:`lightning_opt.strategies` be known to Lightning when Lightning is imported.
Start at :mod:`lightning_opt.optim`, :mod:`lightning_opt.callbacks`, or the ``lightning-opt`` command.
"""

import lazy_loader

from ._lightning.strategy_names import register_when_imported

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_when_imported()
