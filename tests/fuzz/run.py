"""Runs the fuzzer: `python tests/fuzz/run.py --cases 100000 --seed 1`, or one case again with `--case` or `--replay`.

Case N of a run is that of the integer SEED + N. A failure prints a command that shows it again, made as simple as it
gets, and the run goes on; the exit code is 1 where anything was found.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from fuzz.damages import NAMES
from fuzz.made import Case, draw
from fuzz.properties import ViolationError, run


def attempt(case: Case, tally: Counter[str]) -> ViolationError | None:
    """What a case breaks, in a folder of its own that is gone afterwards."""
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        run(case, scratch, tally)
    except ViolationError as violation:
        return violation
    except Exception as error:  # noqa: BLE001  a fault of the fuzzer, to be mended here; the run goes on
        return ViolationError(f"the fuzzer raises {type(error).__name__}", str(error)[:300])
    finally:
        shutil.rmtree(scratch)
    return None


def simpler(case: Case) -> Iterator[Case]:
    """The case with one thing left out or set to what it usually is."""
    for index in range(len(case.damages)):
        yield replace(case, damages=case.damages[:index] + case.damages[index + 1 :])
    for to in case.to:
        if case.to != (to,):
            yield replace(case, to=(to,))
    for letter in case.beside:
        yield replace(case, beside=case.beside.replace(letter, ""))
    for field in fields(Case):
        if field.name not in ("seed", "to", "damages", "beside") and getattr(case, field.name) != field.default:
            yield replace(case, **{field.name: field.default})


def shrink(case: Case, violation: ViolationError) -> tuple[Case, ViolationError]:
    """The simplest case found that breaks the same thing."""
    again = True
    while again:
        again = False
        for other in simpler(case):
            found = attempt(other, Counter())
            if found is not None and found.kind == violation.kind:
                case, violation, again = other, found, True
                break
    return case, violation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run the case of this integer alone")
    parser.add_argument("--replay", help="run this case alone, as a failure printed it")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.replay is not None:
        cases = iter([Case.from_json(given.replay)])
    elif given.case is not None:
        cases = iter([draw(given.case, NAMES)])
    else:
        cases = (draw(given.seed + index, NAMES) for index in range(given.cases))
    tally, kinds, start, count = Counter[str](), Counter[str](), time.perf_counter(), 0
    for case in cases:
        count += 1
        violation = attempt(case, tally)
        if violation is not None:
            kinds[violation.kind] += 1
            if kinds[violation.kind] <= 3:
                small, shown = shrink(case, violation)
                print(f"{shown}\n  python tests/fuzz/run.py --replay '{small.to_json()}'", flush=True)
            if given.stop:
                break
        if count % 1000 == 0:
            print(f"{count} cases, {sum(kinds.values())} failures, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{count} cases in {time.perf_counter() - start:.0f} s: {dict(sorted(tally.items()))}")
    print(f"failures: {dict(kinds) or 'none'}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
