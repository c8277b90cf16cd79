"""Training with our losses follows training with the originals: see tests/convergence.py, which stores whole curves."""

from __future__ import annotations

import json

import convergence
import numpy as np
import pytest
import torch


@pytest.mark.parametrize("name", convergence.LOSSES)
def test_the_first_steps_are_the_same(name):
    """Before rounding errors have had time to grow: 15 steps."""
    seed = 4
    torch.set_num_threads(1)
    ours = np.array(convergence.curve(convergence._ours(), name, seed, 15))
    theirs = np.array(convergence.curve(convergence._originals(), name, seed, 15))
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()
    assert np.ptp(theirs) > 0


def test_stored_curves_are_within_the_noise_of_three_seeds():
    stored = json.loads(convergence.RESULTS.read_text())["results"]
    assert {r["loss"] for r in stored} == set(convergence.LOSSES)
    for r in stored:
        assert len(r["seeds"]) == 3 and r["apart"] <= 0.1 * r["noise"], r
        assert r["last_ours"] < 0.9 * r["first"], f"{r['loss']} has learnt nothing"
