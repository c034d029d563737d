from .fzoos import FZooSStrategy as FZooSStrategy
