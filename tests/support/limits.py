"""Bounds on the time that something takes, whatever machine the tests run on and whether a coverage tool traces it."""

import sys
import time
from operator import mul

# What squaring a million numbers takes on the machine that bounds are meant for, and how much longer traced code takes.
_SQUARES, _TRACED = 0.06, 6


def seconds(bound: float, *, child: bool = False) -> float:
    """A bound in seconds of the processor, as much longer as this machine is slower just now.

    Args:
        child: Whether it is for another process, which nobody traces.
    """
    if sys.gettrace() is not None and not child:
        return _TRACED * bound
    begin = time.process_time()
    sum(map(mul, range(10**6), range(10**6)))  # no line of Python, which would be traced
    return bound * max(1.0, (time.process_time() - begin) / _SQUARES)
