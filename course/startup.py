"""Read at the start of every kernel that `make lab` opens (by PYTHONSTARTUP): finds `utils` wherever a notebook lies.

A cell that is run too early then says what to do even in a kernel that was just restarted. It leaves no name behind.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120 (no name is left)
import utils

utils.explain_name_errors()
del os, sys, utils
