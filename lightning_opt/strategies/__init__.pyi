from .cbo import CBOStrategy as CBOStrategy
from .deep_ga import DeepGAStrategy as DeepGAStrategy
