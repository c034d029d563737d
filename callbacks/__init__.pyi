from ._report_panel import Panel as Panel
from .dale_law_monitor import DaleLawMonitor as DaleLawMonitor
from .optimizer_monitor import OptimizerMonitor as OptimizerMonitor
from .resume_state import ResumeState as ResumeState
from .run_report import RunReport as RunReport
from .schedule_check import ScheduleCheck as ScheduleCheck
