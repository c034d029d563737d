from ._launch import launch as launch
from ._launch import unsupported as unsupported
from ._noise_map import launch_map as launch_map
from ._noise_map import unsupported_map as unsupported_map
