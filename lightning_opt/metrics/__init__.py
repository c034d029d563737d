"""Image metrics: distances between sets of images in the features of small networks that the package ships."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
