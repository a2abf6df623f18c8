"""Read at the start of every kernel that `make lab` opens (by PYTHONSTARTUP): finds `utils` wherever a notebook lies.

So a cell that is run too early says what to do even in a kernel that was just restarted. It leaves no name behind.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (no name is left behind)
import utils

del os, sys, utils
