from .sample_based import SampleBasedLR as SampleBasedLR
