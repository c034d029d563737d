from .cbo import CBOStrategy as CBOStrategy
