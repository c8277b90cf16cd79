"""How much faster is a step of the local stage than plain PyTorch's, and how much memory does it save?"""

from __future__ import annotations

import pytest

from benchmarks import trainer


def test_trainer(request):
    quick = request.config.getoption("--quick")
    folder = request.config.getoption("--results")
    found = trainer.measure(0.0, 4, 32, 2) if quick else trainer.measure(request.config.getoption("--seconds"))
    for name, (_, other) in trainer.STEPS.items():
        if other:
            assert found[name]["layers"] >= 8
            assert found[name]["loss_difference"] < 0.02, name  # the same training, up to rounding
    if not quick:
        trainer.merge(folder / "trainer" if folder else trainer.RESULTS, found, "time")


@pytest.mark.parametrize("name", trainer.TRAINING)
def test_trainer_memory(request, name):
    if request.config.getoption("--quick"):
        assert set(trainer.memory_here(name, 4, 32)) == {"peak_bytes"}
        return
    folder = request.config.getoption("--results")
    trainer.merge(folder / "trainer" if folder else trainer.RESULTS, {name: trainer.memory_apart(name)}, "memory")
