"""Deep GA: a genetic algorithm whose individuals are the seeds of their mutations."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
