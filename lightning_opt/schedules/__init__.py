"""Learning-rate schedules in optimizer steps, and the functions that compute schedules from a run's record."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
