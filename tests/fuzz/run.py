"""Runs the fuzzer: `python tests/fuzz/run.py --cases 100000 --seed 1`, or one case again with `--case` or `--replay`.

Case N of a run is that of the integer SEED + N, whichever of the `--jobs` processes tries it. A failure prints a
command that shows it again, made as simple as it gets, and the run goes on; the exit code is 1 where anything was
found.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch

from fuzz.cases import Case, draw
from fuzz.damages import NAMES
from fuzz.properties import run
from fuzz.takes import ViolationError

BLOCK, EVERY, SHOWN = 100, 5000, 3  # cases that a process tries at a time, and between two lines; failures of a kind


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
    fixed = (
        "seed",
        "to",
        "damages",
        "beside",
        *(("family", "E", "H", "I", "layers") if case.also == "loading" else ()),
    )
    for field in fields(Case):
        if field.name not in fixed and getattr(case, field.name) != field.default:
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


def block(start: int, count: int) -> tuple[Counter[str], list[tuple[Case, ViolationError]]]:
    """(what was done, what was found) in so many cases."""
    tally = Counter[str]()
    tried = ((case, attempt(case, tally)) for case in (draw(seed, NAMES) for seed in range(start, start + count)))
    return tally, [(case, violation) for case, violation in tried if violation is not None]


def blocks(seed: int, cases: int, jobs: int) -> Iterable[tuple[int, Counter[str], list[tuple[Case, ViolationError]]]]:
    """(cases, what was done, what was found) of one block after another, as they are done."""
    parts = [(start, min(BLOCK, seed + cases - start)) for start in range(seed, seed + cases, BLOCK)]
    if jobs == 1:
        yield from ((count, *block(start, count)) for start, count in parts)
        return
    one_thread = partial(torch.set_num_threads, 1)
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork"), initializer=one_thread) as pool:
        coming = {pool.submit(block, start, count): count for start, count in parts}
        yield from ((coming[done], *done.result()) for done in as_completed(coming))


def import_slowly() -> None:
    """What the package imports when it needs it, where installed: no case is to be stopped in the middle of that."""
    for name in ("torch._dynamo", "transformers.modeling_utils", "transformers.models.auto", "peft"):
        if find_spec(name.partition(".")[0]):
            import_module(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--case", type=int, help="run the case of this integer alone")
    parser.add_argument("--replay", help="run this case alone, as a failure printed it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    import_slowly()
    done, tally, kinds, start = 0, Counter[str](), Counter[str](), time.perf_counter()
    if given.replay is not None or given.case is not None:
        case = draw(given.case, NAMES) if given.replay is None else Case.from_json(given.replay)
        violation = attempt(case, tally)
        results: Iterable[Any] = [(1, tally.copy(), [(case, violation)] if violation else [])]
        tally.clear()
    else:
        results = blocks(given.seed, given.cases, given.jobs)
    for count, did, found in results:
        for case, violation in found:
            kinds[violation.kind] += 1
            if kinds[violation.kind] <= SHOWN:
                small, shown = shrink(case, violation)
                print(f"{shown}\n  python tests/fuzz/run.py --replay '{small.to_json()}'", flush=True)
        if (done + count) // EVERY > done // EVERY:
            passed = time.perf_counter() - start
            print(f"{done + count} cases, {sum(kinds.values())} failures, {passed:.0f} s", flush=True)
        done += count
        tally += did
    print(f"{done} cases in {time.perf_counter() - start:.0f} s: {dict(sorted(tally.items()))}")
    print(f"failures: {dict(kinds) or 'none'}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
