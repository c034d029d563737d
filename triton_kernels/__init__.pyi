from ._launch import launch as launch
from ._noise_map import launch_map as launch_map
from ._support import unsupported as unsupported
from ._support import unsupported_map as unsupported_map
