from ._launch import launch as launch
from ._launch import unsupported as unsupported
