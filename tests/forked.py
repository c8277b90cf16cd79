"""A process computes, and its fork the same again: ``python tests/forked.py WORK``, exit code 0 where they agree.

A fork has none of its parent's OpenMP threads, and whatever waits for them waits forever: PyTorch's own products do, so
a child calls ``torch.set_num_threads(1)`` before any of those (its DataLoader does that), while our kernels start
threads of their own there. A process that asks autograd for gradients on a CPU alone starts no thread for it.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import every_loss
import torch
from torch import Tensor

import ffcl_fast.functional as fn

PATIENCE = 100  # seconds for a child; it takes less than one
THREADS = 3  # also where there are fewer processors


def forward_alone() -> list[Tensor]:
    x = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    args = x, x, torch.tensor(5.0), None, None, 0
    return list(torch.ops.ffcl_fast.similarity_forward(*args, True, False, "cpu")[:2])


def kernels() -> list[Tensor]:
    """Forward and backward of what is our kernels' work but for small sums, in many tasks for several threads."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(400, 64, generator=generator).requires_grad_() for _ in range(2))
    scale = torch.tensor(5.0, requires_grad=True)
    labels = torch.arange(400) % 7
    target = 1.0 - 2 * (labels == 0)
    value = fn.info_nce(x, y, temperature=1 / scale) + fn.nt_xent(x, y, 1 / scale) + fn.clip(x, y, scale)
    value = value + fn.siglip(x, y, scale, -1.0) + fn.sup_con(torch.stack((x, y), 1), labels)
    value = value + sum(v.sum() for v in fn.similarity_lse(x, y, scale, normalize=True))
    value = value + fn.pair_cosine(x, y, target) + fn.goodness(x, relu=True).sum()
    value = value + fn.pool_goodness(y[:, :, None])[0].sum()
    return [value.detach(), *torch.autograd.grad(value, (x, y, scale))]


def every() -> list[Tensor]:
    """Forward and backward of every function."""
    torch.manual_seed(3)
    leaves = tuple(x.requires_grad_() for x in every_loss.inputs())
    return [x for name in every_loss.LOSSES for x in every_loss.run(name, leaves)]


# WORK -> (what the parent does before, what both do, threads of the child)
WORK = {
    "the first kernel": (lambda: None, forward_alone, THREADS),
    "kernels": (kernels, kernels, THREADS),
    "everything": (every, every, 1),
}


def main(name: str) -> int:
    before, work, threads = WORK[name]
    torch.set_num_threads(THREADS)
    (torch.randn(1000, 1000) @ torch.randn(1000, 1000)).sum()  # PyTorch's threads run
    before()
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(threads)
            found = as_bytes(work())
            while found:
                found = found[os.write(sender, found) :]
        except BaseException as error:
            print(f"the child failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(sender)
    found = of_child(child, receiver)
    if found is None:
        print(f"{name}: the child of a fork hangs: killed after {PATIENCE} s", file=sys.stderr)
        return 1
    a, b = (torch.frombuffer(bytearray(x), dtype=torch.float32) for x in (found, as_bytes(work())))
    if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-6):
        print(f"{name}: the child of a fork computes something else", file=sys.stderr)
        return 1
    return 0


def as_bytes(results: list[Tensor]) -> bytes:
    return b"".join(x.detach().numpy().tobytes() for x in results)


def of_child(child: int, receiver: int) -> bytes | None:
    """What it sends, at most what it had sent when it ended; None where it had to be killed."""
    os.set_blocking(receiver, False)
    found, until = b"", time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            part = os.read(receiver, 1 << 16)
        except BlockingIOError:
            time.sleep(0.05)
            continue
        if not part:
            os.waitpid(child, 0)
            return found
        found += part
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
