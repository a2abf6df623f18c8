"""Read at the start of every kernel that `make lab` opens (by PYTHONSTARTUP): finds `utils` wherever a notebook lies.

So a cell that is run too early says what to do even in a kernel that was just restarted. It leaves no name behind.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
import utils

del sys, utils
