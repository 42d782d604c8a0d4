"""The fused kernels compiled for devices that need not be there: what they ask of one, and that they load ahead.

Beside the interpreter, which checks numbers, this is what runs without a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.sass import overwritten

pytest.importorskip(
    "triton", reason="triton is on no CPU-only install but tox's `kernels`, `triton360` and `...-torch...`"
)

# Bytes of shared memory of a program: the least of any device of compute capability 8.x and 12.x, and Hopper's.
SHARED = {80: 99 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def aot(*arguments):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).parents[1] / "support" / "aot.py", *arguments]
    return json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)


@pytest.fixture(scope="module")
def kernels():
    return aot()


def test_every_kernel_is_launched_and_compiles():
    found = aot("launched")
    assert found["launched"] == found["defined"]
    assert found["together"] == {"names": ["_count", "_place"], "apart": True, "launches": 0}
    # Of two kernels: a launch with hooks goes triton's own way, without any a shorter one, and all come to the same.
    count, place, *others = found["given"]
    assert others == [count, place] * 3
    assert found["hooks"] == [True] * 4 + [False] * 4


def test_every_kernel_fits_the_smallest_device(kernels):
    assert {k["capability"] for k in kernels} == set(SHARED)
    assert [k for k in kernels if k["shared"] > SHARED[k["capability"]]] == []


def test_nothing_spills_at_the_usual_rank(kernels):
    """A register or two kept over a kernel's length, as triton 3.5's assembler does at 80 of them, is none."""
    assert [k for k in kernels if k["stack"] > 8 and k["R"] == 16 and k["dtype"] == "bf16"] == []


LOOP = """
    /*0010*/  LDS.64 R6, [R2] ;
    /*0020*/  WARPGROUP.DEPBAR.LE gsb0, {left} ;
    /*0030*/  F2FP.BF16.F32.PACK_AB R{to}, R6, R7 ;
    /*0040*/  HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8], R24 ;
    /*0050*/  HGMMA.64x64x16.F32.BF16 R24, R16, gdesc[UR8], R24, gsb0 ;
    /*0060*/  @P0 BRA 0x10 ;
"""


@pytest.mark.parametrize(("left", "to", "found"), [("0x0", 8, 0), ("0x1", 8, 1), ("0x1", 11, 1), ("0x1", 12, 0)])
def test_a_register_is_found_that_is_overwritten_on_the_next_time_round(left, to, found):
    assert len(overwritten(LOOP.format(left=left, to=to))) == found


def test_no_register_is_overwritten_that_a_multiplication_under_way_reads(kernels):
    """Which the interpreter cannot show, and a GPU only at times."""
    assert [(k["kernel"], k["overwritten"]) for k in kernels if k["overwritten"]] == []


def test_what_is_no_number_stays_that(kernels):
    """A minimum or maximum drops NaN unless told otherwise, which the interpreter cannot show."""
    assert {"activate, clamped", "backward, clamped", "activate, relu"} <= {k["kernel"] for k in kernels}
    assert [k["kernel"] for k in kernels if k["loses NaN"]] == []


def test_the_kernels_bound_by_memory_load_ahead(kernels):
    """All but what has no loop, and the backward that waits between loads and stores, for rows of odd width alone."""
    idle = {k["kernel"] for k in kernels if not k["loads ahead"] and "Codec" not in k["kernel"]}
    assert idle == {"backward, waiting", "add, dropping", "draw"}
