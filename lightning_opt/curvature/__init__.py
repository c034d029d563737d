"""Curvature of a loss without forming matrices: operators, Lanczos, spectral densities, eigenpairs, traces."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
