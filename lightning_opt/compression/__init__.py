"""Compressed gradients for data-parallel training: compressors, and error feedback as a DDP communication hook.

Needs torch alone; :mod:`lightning_opt.strategies` brings it to the Trainer.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
