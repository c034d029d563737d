from .cbo import CBOStrategy as CBOStrategy
from .deep_ga import DeepGAStrategy as DeepGAStrategy
from .econtrol import EControlStrategy as EControlStrategy
from .ef14 import EF14Strategy as EF14Strategy
from .ef21 import EF21Strategy as EF21Strategy
from .fzoos import FZooSStrategy as FZooSStrategy
from .naive_compression import NaiveCompressionStrategy as NaiveCompressionStrategy
from .smoothness import estimate_smoothness as estimate_smoothness
