"""Diffusion models of positive data: processes, scores, losses, and samplers as diffusers schedulers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
