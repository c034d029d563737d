"""Lightning strategies: data-parallel training with compressed gradients, and training without gradients.

Each has short names for ``Trainer(strategy=...)`` and ``--trainer.strategy``, which are there after
``import lightning_opt``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
