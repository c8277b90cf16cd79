"""tests/emulation/races.cpp finds every race of tests/emulation/races_kernels.cu, and none where they are mended."""

from __future__ import annotations

import pytest
import torch
from emulated import emulated, emulated_module, use  # noqa: F401
from similarity_cases import problem
from test_cuda_similarity import compare

from ffcl_fast import ops

SEEDS = range(8)  # orders of the threads

# What is told of each kernel, whatever the order. Where two threads only miss each other, either may be the first.
PLAIN = r"race in byte \d+ of block [0-3]'s shared memory: (read|write) of thread .* before it (read|write) of thread "
COPIES = r"race in .*: .*(read|write) of thread .* before it write by cp.async|write by cp.async .* before it read of "
BULK = r"race in .*(write by TMA .* before it read of thread|read of thread .* before it write by TMA)"
GLOBAL = r"race in global memory at 0x\w+: (read|write) of thread \d+ of block \d \(.*before it (read|write) of thread"
KERNELS = {
    "no_barrier_before_a_read": PLAIN,
    "no_barrier_before_the_next_write": PLAIN,
    "a_barrier_of_half_the_threads": PLAIN,
    "nothing_within_a_warp": PLAIN,
    "a_shuffle_for_a_fence": PLAIN,
    "ldmatrix_without_a_barrier": PLAIN,
    "two_threads_store_the_same_half_word": PLAIN,
    "copies_that_only_another_warp_waits_for": COPIES,
    "a_wait_after_the_barrier": COPIES,
    "a_stage_of_copies_filled_while_it_is_read": COPIES,
    "a_place_refilled_before_all_gave_it_back": BULK,
    "given_back_before_it_is_read": BULK,
    "a_bulk_copy_that_nobody_waits_for": BULK,
    "a_barrier_that_may_not_be_initialised": r"race in .*|at a barrier that was not initialised",
    "an_operand_replaced_before_its_product_is_done": r"race in .*: write by TMA .* before it read by wgmma",
    "an_operand_that_a_thread_wrote": r"no proxy fence in byte 4 of .* read by wgmma .* before it write of thread 200 ",
    "blocks_of_a_cluster_meet_each_for_itself": PLAIN,
    "blocks_that_only_know_of_each_other": PLAIN,
    "a_block_ends_while_the_other_reads": r"a block ended that may not have seen the end of .*|a block that has ended",
    "a_block_that_may_not_have_started": r"shared memory of a block that may not have started",
    "two_blocks_write_one_address": GLOBAL,
    "a_block_reads_what_another_wrote": GLOBAL,
    "a_block_writes_what_another_read": GLOBAL,
    "barriers_that_are_not_ready_for_bulk_copies": "before barriers_ready",
    "products_without_a_fence_of_registers": "products without a products_begin",
    "a_read_past_the_end": "past the end of shared memory: read of thread 0 of block",
    "a_copy_past_the_end": "cp.async outside shared memory",
    "a_store_to_global_memory_of_a_shared_address": "of an address in shared memory",
}


def test_no_kernel_is_forgotten(emulated_module):  # noqa: F811
    assert set(emulated_module.race_names()) == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_a_race_is_found_in_any_order_and_nothing_where_it_is_mended(name, emulated):  # noqa: F811
    for seed in SEEDS:
        emulated.set_order(seed)
        with pytest.raises(RuntimeError, match=KERNELS[name]):
            emulated.run_race(name, mended=False)
        emulated.set_order(seed)
        emulated.run_race(name, mended=True)


def test_the_lines_of_both_accesses_are_told(emulated):  # noqa: F811
    with pytest.raises(RuntimeError, match=r"\(races_kernels.cu:\d+.*before it .*\(races_kernels.cu:\d+"):
        emulated.run_race("a_place_refilled_before_all_gave_it_back", mended=False)


def test_columns_of_one_tile(emulated):  # noqa: F811
    """A group without a tile in a column closes it and the next one with nothing between that would order the two."""
    use(emulated, 90, processors=2)
    cut = emulated.sums_plan(1100, 1000, False, True, 2)
    assert cut["span"] == 4 and 0 < 1100 % cut["side"] <= 128
    compare(*problem(1100, 1000, 24, torch.bfloat16, ops.EXCLUDE_NONE, False))
