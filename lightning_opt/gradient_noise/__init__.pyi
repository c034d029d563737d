from .batch_tests import BatchTest as BatchTest
from .batch_tests import next_batch_size as next_batch_size
from .batch_tests import required_batch_size as required_batch_size
from .batch_tests import split_batch as split_batch
from .per_sample import per_sample_gradients as per_sample_gradients
from .per_sample import per_sample_statistics as per_sample_statistics
from .running import RunningGradientStatistics as RunningGradientStatistics
from .statistics import GradientStatistics as GradientStatistics
