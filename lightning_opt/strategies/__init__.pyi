from .deep_ga import DeepGAStrategy as DeepGAStrategy
