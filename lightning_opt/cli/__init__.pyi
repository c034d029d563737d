from .checkpoint import PeriodicCheckpoint as PeriodicCheckpoint
from .command import main as main
from .errors import UserError as UserError
from .lightning_cli import LightningOptCLI as LightningOptCLI
