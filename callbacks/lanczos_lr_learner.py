import functools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt._lightning.log_rows import write_row
from lightning_opt.curvature import (
    CurvatureOperator,
    Guards,
    LanczosResult,
    NonFiniteCurvatureError,
    curvature_range,
    guarded,
    lanczos,
    step_rule,
)
from lightning_opt.curvature.step_rules import RULES, LowerEnd, Rule
from lightning_opt.registry import register

from ._learning_rate import largest_lr, momentum_of, only_optimizer, scale_lr, set_lr
from ._log_values import is_wanted
from ._loss_curvature import Products, check_has_curvature, completes_step, loss_curvature, part_of
from ._ownership import Possession, check_no_scheduler, check_sole_owner
from ._refresh_schedule import RefreshSchedule
from ._report_curves import COLORS
from ._report_history import Curve
from ._report_panel import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
