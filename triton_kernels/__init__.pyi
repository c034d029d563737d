from ._launch import launch as launch
from ._support import unsupported as unsupported
