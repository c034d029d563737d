from .deis import deis_coefficients as deis_coefficients
from .deis import ipndm_coefficients as ipndm_coefficients
from .deis import network_calls as network_calls
