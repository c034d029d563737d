from ._report_panel import Panel as Panel
from .adaptive_batch_size import AdaptiveBatchSize as AdaptiveBatchSize
from .dale_law_monitor import DaleLawMonitor as DaleLawMonitor
from .grad_norm_recorder import GradNormRecorder as GradNormRecorder
from .optimizer_monitor import OptimizerMonitor as OptimizerMonitor
from .resume_state import ResumeState as ResumeState
from .run_report import RunReport as RunReport
from .schedule_check import ScheduleCheck as ScheduleCheck
