"""The simulation of many ranks: its numerics, and that the model on paper describes what is really sent."""

from __future__ import annotations

import pytest
import torch

from tools.schedule_model import Machine, Problem, crossover, memory, seconds, traffic
from tools.simulate_ranks import main, simulate

MACHINE = Machine(rate=1e9, bandwidth=1e9, latency=1e-5, hop=2e-6, call=1e-6)
NARROW = Machine(rate=1e9, bandwidth=1e7, latency=1e-5, hop=2e-6, call=1e-6)  # messages take longer than products


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("strategy", ("gather", "ring"))
@pytest.mark.parametrize("world", (2, 5, 8))
def test_even_ranks(world, strategy, symmetric, seed):
    problem = Problem(world, 12, 8, symmetric=symmetric)
    result = simulate(problem, strategy, MACHINE, timed=False, seed=seed)
    assert result["error"] < 1e-5
    assert result["sent"] == pytest.approx(traffic(problem, strategy))
    assert result["seconds"] == pytest.approx(seconds(problem, strategy, MACHINE), rel=0.05)
    narrow = simulate(problem, strategy, NARROW, timed=False, seed=seed)["seconds"]
    assert narrow == pytest.approx(seconds(problem, strategy, NARROW), rel=0.25)


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("strategy", ("gather", "ring"))
def test_uneven_ranks(strategy, symmetric, seed):
    sizes = torch.randint(1, 9, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    assert simulate(Problem(6, 4, 8, symmetric=symmetric), strategy, MACHINE, False, sizes, seed)["error"] < 1e-5


@pytest.mark.parametrize("symmetric", (False, True))
def test_sixty_four_ranks(symmetric, seed):
    assert simulate(Problem(64, 4, 8, symmetric=symmetric), "ring", MACHINE, timed=False, seed=seed)["error"] < 1e-5
    assert simulate(Problem(64, 4, 8, symmetric=symmetric), "gather", MACHINE, timed=False, seed=seed)["error"] < 1e-5


def test_model_on_paper():
    """What it says of scale: a gather's memory grows with the ranks, a ring's does not; symmetry halves the work."""
    few, many = (Problem(w, 1024, 256) for w in (8, 1024))
    assert memory(many, "ring") == memory(few, "ring") and memory(many, "gather") == 128 * memory(few, "gather")
    assert Problem(8, 64, 64, symmetric=True).passes() == Problem(8, 64, 64).passes() / 2
    assert crossover(many, MACHINE, free=memory(few, "gather")).startswith("ring")
    slow_link, fast_link = Machine(1e15, 1e9, 1e-6), Machine(1e15, 1e15, 1e-6)
    assert seconds(few, "ring", fast_link) < seconds(few, "ring", slow_link)


def test_command(capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)  # the caller's, whatever it is
    assert main(["--ranks", "3", "--rows", "6", "--dim", "4", "--rate", "1e9"]) == 0
    assert capsys.readouterr().out.count("error") == 4
    assert main(["--paper", "--rate", "1e14", "--dim", "512"]) == 0
    assert capsys.readouterr().out.count("\n") == 18
    assert main(["--paper", "--bandwidth", "4e10", "--dim", "512"]) == 0  # kernels as measured
    assert capsys.readouterr().out.count("\n") == 18
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
