__version__: str
from . import callbacks as callbacks
from . import cli as cli
from . import compression as compression
from . import cpu_kernels as cpu_kernels
from . import curvature as curvature
from . import data as data
from . import diffusion as diffusion
from . import metrics as metrics
from . import models as models
from . import optim as optim
from . import registry as registry
from . import schedules as schedules
from . import solvers as solvers
from . import strategies as strategies
from . import testing as testing
from . import triton_kernels as triton_kernels
