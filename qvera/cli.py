"""The command line: parse, dispatch, and turn errors into messages and exit codes. Nothing else lives here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .errors import EXIT_DONE, EXIT_FAILED, InputError, QveraError
