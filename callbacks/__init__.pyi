from ._report_panel import Panel as Panel
from .dale_law_monitor import DaleLawMonitor as DaleLawMonitor
from .lanczos_lr_learner import LanczosLRLearner as LanczosLRLearner
from .optimizer_monitor import OptimizerMonitor as OptimizerMonitor
from .resume_state import ResumeState as ResumeState
from .run_report import RunReport as RunReport
from .stability_booster import StabilityBooster as StabilityBooster
from .stability_monitor import StabilityMonitor as StabilityMonitor
