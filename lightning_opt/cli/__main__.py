"""``python -m lightning_opt.cli``: the ``lightning-opt`` command without its entry point."""

import sys

from .command import main

sys.exit(main())
