"""Bounds on the time that something takes, whatever machine the tests run on and whether a coverage tool traces it."""

import sys
import time

# What squaring a million numbers takes on the machine that bounds are meant for, and how much longer traced code takes.
_SQUARES, _TRACED = 0.06, 6


def seconds(bound: float) -> float:
    """A bound in seconds of the processor, as much longer as this machine is slower just now."""
    if sys.gettrace() is not None:
        return _TRACED * bound
    begin = time.process_time()
    sum(i * i for i in range(10**6))
    return bound * max(1.0, (time.process_time() - begin) / _SQUARES)
