"""What is particular to the C++ similarity kernels: threads, instruction sets, the cache, memory, fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ffcl_fast
from ffcl_fast import ops, reference
from ffcl_fast.backends import native
from ffcl_fast.backends.cpu import similarity

pytestmark = pytest.mark.skipif(native.module is None, reason="ffcl_fast._native was not built")

PAIRS = ("portable_bf16", "avx512_bf16", "portable_amx", "amx")  # products of pairs of bfloat16


def _problem(n=700, m=1000, d=40, symmetric=False):
    q = F.normalize(torch.randn(n, d), dim=1)
    k = None if symmetric else F.normalize(torch.randn(m, d), dim=1)
    return q, k, torch.tensor(14.0), None, None, ops.EXCLUDE_DIAGONAL


def _run(args, save=True):
    row, col, cache = similarity.similarity_forward(*args, True, save)
    grads = similarity.similarity_backward(*args, row, col, row.sigmoid(), col.sigmoid(), cache, True, True)
    return row, col, *grads


@pytest.mark.parametrize("symmetric", (False, True))
def test_results_do_not_depend_on_threads(symmetric):
    args = _problem(symmetric=symmetric)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(_run(args))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_python_threads_at_once():
    args = _problem()
    expected = _run(args)
    wrong = []

    def work():
        for _ in range(3):
            if not all(torch.equal(a, b) for a, b in zip(expected, _run(args), strict=True)):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.parametrize("symmetric", (False, True))
def test_the_cache_changes_rounding_only(symmetric, monkeypatch):
    """All panels kept, some kept, none kept, no cache at all."""
    args = _problem(900, 2500, 24, symmetric)
    kept = _run(args)
    for budget in (1, 300_000):
        monkeypatch.setattr(similarity, "CACHE_BUDGET", budget)
        assert all(torch.equal(a, b) for a, b in zip(kept, _run(args), strict=True))
    for a, b in zip(kept, _run(args, save=False), strict=True):
        # A normaliser rounded to float32 moves all its row's terms, whose sum may cancel: its size is the tensor's.
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.norm()) / max(1, b.numel()) ** 0.5)


def _check(script: str, isa: str) -> None:
    """A script beside this file in a process of its own; an instruction set that this processor lacks says so."""
    seed = str(torch.randint(0, 2**31, ()).item())
    package = str(Path(ffcl_fast.__file__).parents[1])  # the one under test, installed or not
    env = {
        **os.environ,
        "FFCL_ISA": isa,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
    }
    script = str(Path(__file__).with_name(script))
    done = subprocess.run([sys.executable, script, seed], env=env, capture_output=True, text=True)
    if done.returncode and "this processor has" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    assert done.stdout.split() == [isa]


@pytest.mark.long
@pytest.mark.parametrize("isa", ("portable", "avx2", "avx512", *PAIRS))
def test_instruction_sets(isa):
    _check("isa_check.py", isa)


@pytest.mark.long
@pytest.mark.parametrize("isa", PAIRS)
def test_pairs_of_bfloat16(isa):
    _check("pairs_check.py", isa)


def test_workspace_is_bounded():
    """Peak memory beyond inputs and gradients, measured in a process of its own."""
    script = (
        "import torch, resource, re\n"
        "from ffcl_fast.backends.cpu import similarity as s\n"
        "def high(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "def run(n, d):\n"
        "    q, k = torch.randn(n, d), torch.randn(n, d)\n"
        "    q /= q.norm(dim=1, keepdim=True); k /= k.norm(dim=1, keepdim=True)\n"
        "    a = (q, k, torch.tensor(14.0), None, None, 0)\n"
        "    row, col, cache = s.similarity_forward(*a, True, True)\n"
        "    return a, s.similarity_backward(*a, row, col, row, col, cache, True, True)\n"
        "run(64, 16)\n"
        "n, d = 12288, 32\n"
        "before = high()\n"
        "run(n, d)\n"
        "print(high() - before - 4 * n * d * 4 / 2**20)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64, f"{done.stdout} MiB of workspace"


def test_after_a_fork():
    args = _problem(300, 300)
    expected = _run(args)
    child = os.fork()
    if child == 0:
        same = all(torch.equal(a, b) for a, b in zip(expected, _run(args), strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_ids_beyond_32_bits():
    """Ids that differ in their upper halves only."""
    q, k, scale, *_ = _problem(60, 70, 16)
    row_ids = torch.randint(0, 3, (60,)) * 2**32 + 5
    col_ids = torch.randint(0, 3, (70,)) * 2**32 + 5
    for mode in (ops.EXCLUDE_SAME_ID, ops.EXCLUDE_SAME_ID_OFF_DIAGONAL, ops.EXCLUDE_DIFFERENT_ID):
        row, col, _ = similarity.similarity_forward(q, k, scale, row_ids, col_ids, mode, True, False)
        truth = reference.similarity_forward(q, k, scale, row_ids, col_ids, mode, True, False)
        torch.testing.assert_close(row, truth[0])
        torch.testing.assert_close(col, truth[1])


@pytest.mark.parametrize("scale", (150.0, 200.0, 1000.0))
@pytest.mark.parametrize("save", (False, True))
def test_gradient_of_rows_alone_where_exponentials_overflow(scale, save):
    """Temperature 0.007 and below: columns without a gradient must not add 0 times infinity."""
    q, k = F.normalize(torch.randn(20, 12), dim=1), F.normalize(torch.randn(33, 12), dim=1)
    k[:20] = q  # the largest logits there can be
    args = (q, k, torch.tensor(scale), None, None, ops.EXCLUDE_NONE)
    row, col, cache = similarity.similarity_forward(*args, False, save)
    gradients = similarity.similarity_backward(*args, row, col, row.sigmoid(), col, cache, True, True)
    wide = [q.double(), k.double(), args[2].double(), *args[3:]]
    truth_row, none, _ = reference.similarity_forward(*wide, False, False)
    truth = reference.similarity_backward(*wide, truth_row, none, row.sigmoid().double(), none, None, True, True)
    for ours, exact in zip(gradients, truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("symmetric", (False, True))
def test_running_maxima_over_many_panels(symmetric):
    """Logits that no constant offset covers, in several panels each way: a later one often has the larger maximum."""
    q, k, scale, *_ = _problem(800, 2600, 16, symmetric)
    args = (q, k, 20 * scale, None, None, ops.EXCLUDE_DIAGONAL)
    row, col, cache = similarity.similarity_forward(*args, True, True)
    wide = (q.double(), None if symmetric else k.double(), args[2].double(), *args[3:])
    truth_row, truth_col, _ = reference.similarity_forward(*wide, True, False)
    torch.testing.assert_close(row.double(), truth_row, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(col.double(), truth_col, rtol=1e-6, atol=1e-4)
