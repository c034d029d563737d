"""Multiplicative diffusion: geometric Brownian motion on positive data, its scores, losses and diffusers schedulers.

The mathematics needs torch alone; the schedulers need the extra ``diffusion``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
