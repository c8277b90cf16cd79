"""Plays the schedules of W processes in one: the library's own code and real tiles, a simulated clock and network.

    python -m tools.simulate_ranks --ranks 64 --rows 128     both ways, numerics checked, times predicted
    python -m tools.simulate_ranks --real 2 4 --rows 2048    a step on 2 and on 4 real processes, by the wall clock
    python -m tools.simulate_ranks --paper --rate 4e14 --bandwidth 4e10    tables from assumptions alone
    python -m tools.simulate_ranks --paper --bandwidth 4e10 --latency 2e-5    from the measured kernels of a GPU

Every rank is a thread that runs ``ffcl_fast.distributed.similarity``; only what it sends and receives goes through
mailboxes here. A rank's clock advances by the processor time of its tiles (or by ``--rate``), and by waiting for
messages that take latency + bytes / bandwidth and share their sender's link. Results are compared with one process that
has the whole batch.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ffcl_fast import functional
from ffcl_fast.distributed import similarity
from ffcl_fast.distributed.exchange import Ring
from ffcl_fast.distributed.meeting import Meeting

from .files import write_text
from .processes import run
from .scale_tables import kernels, paper_table
from .schedule_model import Machine, Problem, seconds, traffic

WAIT = 600


class Network:
    """Mailboxes and clocks of ``world`` ranks."""

    def __init__(self, world: int, machine: Machine, block: float | None) -> None:
        self.world, self.machine, self.block = world, machine, block
        self.clock, self.sent = [0.0] * world, [0.0] * world
        self.link = [0.0] * world  # until when a rank's link is busy with what it sends
        self._boxes: dict[tuple[int, int], queue.Queue] = {}
        self.barrier = threading.Barrier(world, timeout=WAIT)
        self.board: list = [None] * world
        self.local = threading.local()

    @property
    def rank(self) -> int:
        return self.local.rank

    def box(self, rank: int, hops: int) -> queue.Queue:
        """Where ``rank`` finds what comes from so many places away. A defaultdict would make two where a sender and a
        receiver ask at once, and lose the message."""
        return self._boxes.setdefault((rank, hops), queue.Queue())

    def together(self, value: Tensor, cost: float, size: float) -> list[Tensor]:
        """Everyone's value; all clocks meet, then advance by ``cost``."""
        self.board[self.rank] = (value, self.clock[self.rank])
        self.sent[self.rank] += size
        self.barrier.wait()
        everyone = list(self.board)
        self.barrier.wait()
        self.clock[self.rank] = max(when for _, when in everyone) + cost
        return [value for value, _ in everyone]

    def gather_rows(self, x: Tensor, rows, group) -> Tensor:
        size = x.numel() * x.element_size()
        cost = (self.world - 1) * self.machine.hopping(size)
        return torch.cat(self.together(x, cost, (self.world - 1) * size))

    def all_reduce_lse(self, x: Tensor, group) -> Tensor:
        size = 8 * x.numel() / self.world
        steps = 4 * (self.world - 1)  # two all-reduces, of the maxima and of the sums
        everyone = self.together(x, steps * self.machine.hopping(size), steps * size)
        return torch.logsumexp(torch.stack(everyone), 0)

    def reduce_scatter_rows(self, x: Tensor, rows, group) -> Tensor:
        size = x.numel() * x.element_size() / self.world
        everyone = self.together(x, (self.world - 1) * self.machine.hopping(size), (self.world - 1) * size)
        first = sum(rows[: self.rank])
        return sum(part[first : first + rows[self.rank]] for part in everyone)


class SimulatedRing(Ring):
    """The library's rotation over mailboxes."""

    def __init__(self, network: Network) -> None:
        self.network, self.rank, self.world = network, network.rank, network.world

    def start(self, tensors, rows: int, hops: int = 1):
        network, rank = self.network, self.rank
        size = sum(x.numel() * x.element_size() for x in tensors)
        network.sent[rank] += size
        network.link[rank] = max(network.link[rank], network.clock[rank]) + size / network.machine.bandwidth
        arrival = network.link[rank] + network.machine.latency
        network.box((rank - hops) % self.world, hops).put(([x.clone() for x in tensors], arrival))

        def wait() -> list[Tensor]:
            received, when = network.box(rank, hops).get(timeout=WAIT)
            network.clock[rank] = max(network.clock[rank], when)
            assert all(x.shape[0] == rows for x in received)
            return received

        return wait


class SimulatedMeeting(Meeting):
    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def ring(self) -> Ring:
        return SimulatedRing(self.group)


def simulate(problem: Problem, strategy: str, machine: Machine, timed: bool, sizes=None, seed: int = 0) -> dict:
    """Play one forward and backward pass. Returns times, bytes sent and the largest error against one process."""
    world, generator = problem.world, torch.Generator().manual_seed(seed)
    sizes = tuple(sizes or [problem.rows] * world)

    def unit() -> Tensor:
        return torch.nn.functional.normalize(torch.randn(sum(sizes), problem.dim, generator=generator), dim=1)

    q = unit()
    k = None if problem.symmetric else unit()
    scale = torch.tensor(10.0)
    u, v = (torch.rand(sum(sizes), generator=generator) for _ in range(2))
    network = Network(world, machine, None if timed else problem.block)
    results: list = [None] * world

    def rank_body(rank: int) -> None:
        network.local.rank = rank
        torch.set_num_threads(1)  # this thread's own number
        try:
            results[rank] = _play(problem, strategy, network, sizes, q, k, scale, u, v)
        except BaseException as error:  # into the report, and the others out of their waits
            results[rank] = error
            network.barrier.abort()

    threads = [threading.Thread(target=rank_body, args=(rank,), daemon=True) for rank in range(world)]
    with ExitStack() as stack:
        stack.enter_context(_one_thread())  # MKL's number is every thread's: it is put back
        for name in ("gather_rows", "all_reduce_lse", "reduce_scatter_rows"):
            stack.enter_context(mock.patch.object(similarity, name, getattr(network, name)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    failed = [r for r in results if not isinstance(r, dict)]
    if failed:
        raise next((f for f in failed if not isinstance(f, threading.BrokenBarrierError)), RuntimeError("a rank hangs"))
    return {
        "error": _error(problem, results, q, k, scale, u, v),
        "seconds": max(network.clock),
        "sent": max(network.sent),
    }


def _play(problem: Problem, strategy: str, network: Network, sizes, q, k, scale, u, v) -> dict:
    meeting = SimulatedMeeting(network, sizes, sizes, strategy)
    own = meeting.own(sizes)
    both = problem.both and not problem.symmetric
    work = _TimedBlocks(scale, False, both, meeting, "auto", problem.symmetric)
    work.network = network
    mine, keys = q[own], None if k is None else k[own]
    gather = strategy == "gather"
    forward = similarity._gather_forward if gather else similarity._ring_forward
    row, col, gathered = forward(work, mine, keys, None, None)
    sides = [similarity._Side(row, u[own])] + ([similarity._Side(col, v[own])] if both else [])
    backward = similarity._gather_backward if gather else similarity._ring_backward
    dq, dk = backward(work, mine, keys, None, None, sides, gathered, True, k is not None)
    return {"row": row, "col": col, "dq": dq, "dk": dk}


class _TimedBlocks(similarity._Blocks):
    """Tiles that move their rank's clock."""

    network: Network

    def forward(self, q, k, *rest):
        return self._timed(super().forward, q, k, 1, q, k, *rest)

    def backward(self, q, k, *rest):
        return self._timed(super().backward, q, k, 3, q, k, *rest)

    def _timed(self, run, q, k, passes, *args):
        began = time.thread_time()
        result = run(*args)
        network = self.network
        if network.block is None:
            spent = time.thread_time() - began
        else:
            pairs = q.shape[0] * (q.shape[0] / 2 if k is None else k.shape[0])
            spent = network.machine.product(passes, 2.0 * pairs * q.shape[1])
        network.clock[network.rank] += spent
        return result


def _error(problem: Problem, results, q, k, scale, u, v) -> float:
    """The largest relative error of all results against one process with everything, in float64."""
    leaf_q = q.double().requires_grad_()
    leaf_k = leaf_q if k is None else k.double().requires_grad_()
    rows, cols = functional.similarity_lse(leaf_q, None if k is None else leaf_k, scale.double(), both=k is not None)
    both = problem.both and not problem.symmetric
    (rows @ u.double() + (cols @ v.double() if both else 0.0)).backward()
    truth = {"row": rows.detach(), "dq": leaf_q.grad}
    if k is not None:
        truth["dk"] = leaf_k.grad
    if both:
        truth["col"] = cols.detach()
    errors = []
    for name, expected in truth.items():
        ours = torch.cat([r[name] for r in results]).double()
        errors.append(float((ours - expected).norm() / expected.norm()))
    return max(errors)


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread, and afterwards on as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- real processes --------------------------------------------------------------------------------------------------


def real(rank: int, world: int, rows: int, dim: int, repeats: int) -> dict[str, Any]:
    """Wall-clock seconds of a step of CLIP's loss in a process of a group, and of its parts: messages by ping-pong, a
    hop of an all-reduce, and a block's loss alone, all processes being at it."""
    import torch.distributed as dist

    import ffcl_fast as ff

    ring, found = Ring(None), dict[str, Any]()
    for name, size in (("latency", 1), ("large", 1 << 20)):
        x = torch.zeros(size)
        found[name] = _median(lambda x=x: ring.start([x], x.shape[0])(), repeats)
    found["bandwidth"] = 4 * (1 << 20) / max(found.pop("large") - found["latency"], 1e-9)
    word = torch.zeros(1)
    found["hop"] = _median(lambda: dist.all_reduce(word), repeats) / (2 * (world - 1))
    x, y = (torch.nn.functional.normalize(torch.randn(rows, dim), dim=1).requires_grad_() for _ in range(2))
    alone = ff.ClipLoss()

    def product() -> None:  # with all processes at it, as in a step
        dist.barrier()
        alone(x, y, 10.0).backward()

    found["product"] = _median(product, repeats)
    steps = {way: ff.ClipLoss(distributed=way) for way in ("gather", "ring")}
    times = _times({way: lambda loss=loss: loss(x, y, 10.0).backward() for way, loss in steps.items()}, repeats)
    for way, spent in times.items():
        found[way], found[f"{way} range"] = spent[repeats // 2], (spent[0], spent[-1])
    return found


def compare(world: int, rows: int, dim: int, repeats: int) -> list[dict[str, Any]]:
    """The model's prediction, from what rank 0 measures of its parts, beside a step of real processes."""
    found = run(world, real, rows, dim, repeats)[0]
    p = Problem(world, rows, dim)
    rate = 4 * p.block / found["product"]
    machine = Machine(rate, found["bandwidth"], found["latency"], found["hop"])
    common = {"world": world, "rows": rows, "dim": dim, "machine": asdict(machine)}
    return [
        {
            **common,
            "strategy": way,
            "predicted_seconds": seconds(p, way, machine),
            "real_seconds": found[way],
            "real_range": found[f"{way} range"],
        }
        for way in ("gather", "ring")
    ]


def _times(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each of ``steps``, sorted; they take turns, so that what disturbs the machine disturbs all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if repeat:
                times[name].append(time.perf_counter() - began)
    return {name: sorted(spent) for name, spent in times.items()}


def _median(step: Callable[[], object], repeats: int) -> float:
    return _times({"": step}, repeats)[""][repeats // 2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="simulate_ranks", description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 8, 16, 32, 64])
    parser.add_argument("--rows", type=int, default=64, help="anchors a rank")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--element", type=int, default=2, help="bytes an element, for --paper")
    parser.add_argument("--rate", type=float, help="operations a second of a rank; default: what was measured")
    parser.add_argument("--bandwidth", type=float, default=1e9, help="bytes a second")
    parser.add_argument("--latency", type=float, default=1e-4, help="seconds a message")
    parser.add_argument("--hop", type=float, help="seconds a hop inside a collective; default: --latency")
    parser.add_argument("--call", type=float, default=0.0, help="seconds an operator takes besides its work")
    parser.add_argument("--free", type=float, default=20e9, help="bytes a gather may take, for --paper")
    parser.add_argument("--real", type=int, nargs="+", help="run that many real processes, compare with the prediction")
    parser.add_argument("--json", type=Path, help="file for what --real finds")
    parser.add_argument("--paper", action="store_true", help="tables from --rate, --bandwidth and --latency alone")
    flags = parser.parse_args(argv)
    machine = Machine(flags.rate or 1e10, flags.bandwidth, flags.latency, flags.hop, flags.call)
    if flags.paper:
        if flags.rate is None:
            machine = replace(machine, kernels=kernels(flags.dim))
        print(paper_table(machine, flags.free, flags.dim, flags.element))
        return 0
    if flags.real:
        return _real(flags)
    with _one_thread():
        return _simulated(flags, machine)


def _real(flags: argparse.Namespace) -> int:
    records = []
    for world in flags.real:
        records += compare(world, flags.rows, flags.dim, 9)
        print(f"{world} processes: {records[-1]['machine']}")
        for r in records[-2:]:
            predicted, actual = r["predicted_seconds"], r["real_seconds"]
            print(
                f"  {r['strategy']:6} predicted {1e3 * predicted:8.2f} ms, real {1e3 * actual:8.2f} ms:"
                f" {actual / predicted:.2f} x",
                flush=True,
            )
    if flags.json:
        from benchmarks.machine import device
        from benchmarks.store import stamp

        what = "a step of CLIP's loss, forward and backward, gloo: the model's prediction and the median of nine"
        head = json.dumps({"what": what, "device": device()["name"], **stamp()})
        lines = ",\n".join("  " + json.dumps(record) for record in records)
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(flags.json, f'{head[:-1]},\n "records": [\n{lines}\n ]}}\n')
    return 0


def _simulated(flags: argparse.Namespace, machine: Machine) -> int:
    wrong = 0
    for symmetric in (False, True):
        for world in flags.ranks:
            for way in ("gather", "ring"):
                if world == 1 and way == "ring":
                    continue
                p = Problem(world, flags.rows, flags.dim, symmetric=symmetric)
                r = simulate(p, way, machine, flags.rate is None)
                wrong += r["error"] > 1e-5
                print(
                    f"{'NT-Xent' if symmetric else 'CLIP':8} W={world:3} {way:6} error {r['error']:.1e}"
                    f"  simulated {1e3 * r['seconds']:9.3f} ms  paper {1e3 * seconds(p, way, machine):9.3f} ms"
                    f"  sent {r['sent'] / 1e6:8.3f} MB  paper {traffic(p, way) / 1e6:8.3f} MB"
                )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
