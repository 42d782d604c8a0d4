"""A reader of one release, from what `--to` calls it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from packaging.version import InvalidVersion, Version

from ..errors import AdapterError
from ..releases import (
    NEWEST_TESTED,
    NEWEST_TRANSFORMERS,
    base_release,
    installed_versions,
    newer_than_tested,
    parse_releases,
    parse_version,
    release_for,
)
from .readers import READERS, Reader

__all__ = ["Target", "parse_target"]


@dataclass(frozen=True)
class Target:
    """A reader that an adapter is for.

    Attributes:
        name: One of `READERS`.
        peft: For `peft`: the release.
        transformers: For `peft`: the release beside it, None where it does not matter.
        release: Of any other reader; None for the newest, in a file that the older ones do not read wrongly: with the
            scaling that each of them applies, and names that each of them knows.
    """

    name: str
    peft: str | None = None
    transformers: str | None = None
    release: str | None = None

    @cached_property
    def reader(self) -> Reader:
        rows = READERS[self.name]
        if self.name == "peft":
            release = base_release(parse_version(str(self.peft)))
        elif self.release is None:
            return replace(rows[-1], scaling=rows[0].scaling, mounted=rows[0].mounted)
        else:
            release = Version(self.release)
        return [row for row in rows if Version(row.since) <= release][-1]

    @property
    def newest_known(self) -> str:
        """What it is taken for, where nothing is known of so new a release; else ""."""
        if self.peft is not None:
            newer = newer_than_tested(self.peft, self.transformers)
            return f"PEFT {NEWEST_TESTED} beside transformers {NEWEST_TRANSFORMERS}" if newer else ""
        since = Version(READERS[self.name][-1].since or "0")
        later = self.release is not None and Version(self.release).release[:2] > since.release[:2]
        return f"{self.reader.title} {since}" if later else ""

    def __str__(self) -> str:
        if self.name != "peft":
            return f"{self.name}=={self.release}" if self.release else self.name
        return f"peft=={self.peft}" + (f",transformers=={self.transformers}" if self.transformers else "")


def parse_target(to: str) -> Target:
    """A reader from its name: `peft` is the installed one, `peft==VERSION[,transformers==VERSION]` another.

    Readers whose releases differ are named `vllm` or `vllm==VERSION`.

    Raises:
        AdapterError: No such reader, none of its releases that are known, or no PEFT is installed.
        UnsupportedPeftError: A PEFT release without expert LoRA.
    """
    if to == "peft":
        found = installed_versions("peft", "transformers")
        if found["peft"] == "not installed":
            raise AdapterError(f"No PEFT is installed to convert for. Name a release: --to peft=={NEWEST_TESTED}.")
        release_for(found["peft"])
        beside = found["transformers"]
        return Target("peft", found["peft"], None if beside == "not installed" else beside)
    if to.startswith("peft=="):
        return Target("peft", *parse_releases(to))
    name, _, release = to.partition("==")
    rows = READERS.get(name, ())
    if not release and to in READERS:
        return Target(to)
    if not rows or not rows[0].since:
        told = [reader for reader, (first, *_) in READERS.items() if first.since and reader != "peft"]
        raise AdapterError(
            f"No reader is called {to!r}; one of {', '.join(READERS)}, peft==VERSION, "
            f"peft==VERSION,transformers==VERSION{''.join(f', {reader}==VERSION' for reader in told)} was expected."
        )
    try:
        known = Version(release) >= Version(rows[0].since)
    except InvalidVersion:
        known = False
    if not known:
        raise AdapterError(
            f"What {rows[0].title} {release} reads is not known; a release from {rows[0].since} on was expected, or "
            f"{name} alone."
        )
    return Target(name, release=release)
