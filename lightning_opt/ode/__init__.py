"""Neural differential equations that are cheap to evaluate: embedded Runge-Kutta steps, blocks, regularizers.

Needs the extra ``ode`` for the methods of torchdiffeq and for stochastic equations; the library's own solver of
ordinary ones needs torch alone.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
