"""How much longer code takes while a coverage tool traces it, for tests that bound the time something takes."""

import sys

TRACED = 1 if sys.gettrace() is None else 6
