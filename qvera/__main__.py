"""``python -m qvera``: the command line, also for torchrun and the deepspeed launcher."""

import sys

from qvera.cli.main import main

sys.exit(main())
