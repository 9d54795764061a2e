"""``python -m qvera``: the command line, also for torchrun and the deepspeed launcher."""

import sys

from .cli import main

sys.exit(main())
