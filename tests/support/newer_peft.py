"""The installed PEFT, said to be a release that nobody has tested; imported before anything asks for its version.

As a plugin (`pytest -p support.newer_peft`) it is that for a whole run of tests.
"""

from __future__ import annotations

import importlib.metadata

import peft

VERSION = "0.99.0"  # not made from the release table, since importing the package would activate it

_version = importlib.metadata.version


def version(name: str) -> str:
    return VERSION if name == "peft" else _version(name)


importlib.metadata.version = version
peft.__version__ = VERSION
