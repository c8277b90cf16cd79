"""tools/cuda_kernels.py: what it reads out of cuobjdump's listings, and what it takes for a problem."""

from __future__ import annotations

import pytest

from tools import cuda_kernels

PREFIX = "_ZN4ffcl51_GLOBAL__N__e456faeb_18_similarity_sm90_cu_b9d2067c"
SUMS = f"{PREFIX}6sums90I13__nv_bfloat16EEvNS_8SumsArgsE14CUtensorMap_stS4_"
ROWS = f"{PREFIX}9over_rowsINS0_8BackwardE6__halfLi8ELi32EJPKfPfEEEvNS0_5ShapeEPKT0_DpT3_"
PAIR = f"{PREFIX}12pair_forwardI6__halfLi8ELi256EEEvNS0_4PairENS_8PairPlanEPKT_S7_PKfffPfSA_PS5_SB_"
USAGE = "  REG:168 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:800 TEXTURE:0"
GOOD = "HGMMA.64x128x16.F32 UTMALDG.2D.MULTICAST UTMALDG.2D USETMAXREG.DEALLOC"


def test_names():
    assert cuda_kernels.describe(SUMS) == ("sums90", "bf16", [], "")
    assert cuda_kernels.describe(ROWS) == ("over_rows", "fp16", [8, 32], "backward")
    assert cuda_kernels.describe(f"{PREFIX}11pool_finishEliPKfPf")[0] == "pool_finish"
    assert cuda_kernels.describe("_ZN4cuda6nothingEv") is None


def test_a_name_after_a_digit():
    """nvcc's hash of the file stands before the kernel's name without anything between."""
    symbol = "_ZN4ffcl43_GLOBAL__N__e456faeb_11_goodness_cu_fbb4c4269many_rowsIfLi4ELb1EEEvPKT_"
    assert cuda_kernels.describe(symbol)[0] == "many_rows"
    assert cuda_kernels.describe(symbol.replace("9many_rows", "8over_row")) is None


def test_a_kernel_that_is_not_there_is_told():
    rows = [{"chip": "sm_80", "kernel": f"{name} forward"} for name in cuda_kernels.EXPECTED if "90" not in name]
    assert cuda_kernels.missing(rows) == []
    assert cuda_kernels.missing(rows[1:]) == ["sm_80 over_rows"]
    assert cuda_kernels.missing([*rows, {"chip": "sm_90a", "kernel": "sums90"}])[-1] == "sm_90a panel90"


def test_a_chip_that_is_not_there_is_told():
    rows = [{"chip": "sm_80", "kernel": name} for name in cuda_kernels.EXPECTED if "90" not in name]
    built_for = cuda_kernels.chips_of(("80-real", "90a", "100", "120-virtual"))
    assert built_for == {"sm_80", "sm_90a", "sm_100"}
    absent = cuda_kernels.missing(rows, built_for)
    assert {"sm_100 sums80", "sm_90a sums90", "sm_90a panel90"} <= set(absent) and "sm_100 sums90" not in absent
    assert not [name for name in absent if name.startswith("sm_80 ")]


def test_a_kernel_that_nothing_is_expected_of_is_told():
    symbol = "_ZN4ffcl48_GLOBAL__N__1a2b3c4d_11_goodness_cu_0123456710new_kernelEPf"
    assert cuda_kernels.row_of("sm_80", symbol, USAGE, "")["problem"] == "not among EXPECTED"
    assert cuda_kernels.row_of("sm_80", "_ZN4cuda6nothingEv", USAGE, "") is None


def test_a_good_kernel():
    row = cuda_kernels.row_of("sm_90a", SUMS, USAGE, GOOD)
    assert "problem" not in row
    assert (row["registers"], row["stack"], row["spills"]) == (168, 0, 0)


@pytest.mark.parametrize(
    "symbol, usage, sass, problem",
    (
        (SUMS, USAGE, GOOD.replace("HGMMA", "HMMA"), "no HGMMA"),
        (SUMS, USAGE, GOOD.replace(".MULTICAST", ""), "no UTMALDG.2D.MULTICAST"),
        (SUMS, USAGE, GOOD + " STL.64 LDL", "2 spills"),
        (SUMS, USAGE.replace("STACK:0", "STACK:16"), GOOD, "16 stack"),
        (ROWS, USAGE, "LDG.E.64 STG.E.128", "no 16-byte loads"),
        (PAIR, USAGE, "LDG.E.128 STG.E STG.E.128", "no 16-byte copies"),
        (ROWS, USAGE, "LDG.E.128 STG.E STG.E.64 STG.E.128", "2 stores of less than 16 bytes, of at most 1"),
    ),
)
def test_problems(symbol, usage, sass, problem):
    assert cuda_kernels.row_of("sm_90a", symbol, usage, sass)["problem"] == problem


def test_single_elements_need_no_wide_loads():
    assert "problem" not in cuda_kernels.row_of("sm_80", ROWS.replace("Li8E", "Li1E"), USAGE, "LDG.E.U16")


def test_sections():
    listing = "arch = sm_80\n\t\tFunction : a\n one\n two\narch = sm_90a\n\t\tFunction : b\n three\n"
    found = cuda_kernels.sections(listing, r"\s*Function : (\S+)")
    assert found == [("sm_80", "a", " one\n two"), ("sm_90a", "b", " three")]
