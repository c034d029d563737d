"""Fused CPU updates: one multi-threaded pass over memory for all tensors of a step."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
