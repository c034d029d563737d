from ._support import unsupported as unsupported
