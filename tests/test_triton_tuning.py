"""Which tile a Triton kernel runs with: choices measured on request and their cache on disk. No GPU is used."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from ffcl_fast import ops  # noqa: E402
from ffcl_fast.backends.triton import config, tuning  # noqa: E402
from ffcl_fast.backends.triton.config import Tile, candidates  # noqa: E402
from ffcl_fast.backends.triton.similarity_forward import shares  # noqa: E402
from ffcl_fast.backends.triton.tuning import pick  # noqa: E402

CHOICES = candidates("forward", "sm90", "half", 512)


@pytest.fixture(autouse=True)
def hopper(monkeypatch, tmp_path):
    """A pretended H200 whose cache is empty."""
    monkeypatch.setattr(config, "family", lambda device: "sm90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Made up/H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("FFCL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FFCL_TUNE", raising=False)
    tuning._stored.cache_clear()
    yield
    tuning._stored.cache_clear()


@pytest.fixture
def operands():
    return torch.zeros(3000, 512, dtype=torch.bfloat16), torch.zeros(2000, 512, dtype=torch.bfloat16)


def never() -> float:
    raise AssertionError("timed without being asked")


def timer(times: dict[Tile, float], seen: list[Tile]):
    """measure() as a backend passes it: times the tile that `override` put there."""

    def measure() -> float:
        seen.append(tuning._override["forward"])
        return times[seen[-1]]

    return measure


def cached() -> dict:
    return json.loads(tuning.cache_file(torch.device("cpu")).read_text())


def test_nothing_is_timed_unless_asked(operands):
    assert len(CHOICES) > 1
    assert pick("forward", *operands, measure=never) == CHOICES[0]
    assert not tuning.cache_file(torch.device("cpu")).exists()


def test_the_fastest_is_stored_and_used_by_the_next_process(operands, monkeypatch):
    monkeypatch.setenv("FFCL_TUNE", "1")
    times, seen = {tile: float(len(CHOICES) - i) for i, tile in enumerate(CHOICES)}, []
    assert pick("forward", *operands, measure=timer(times, seen)) == CHOICES[-1]
    assert seen == CHOICES and not tuning._override
    assert cached() == {"forward/half/512/4096x2048": asdict(CHOICES[-1])}
    assert not list(tuning.cache_file(torch.device("cpu")).parent.glob("tmp*"))
    tuning._stored.cache_clear()  # as a new process
    assert pick("forward", *operands, measure=never) == CHOICES[-1]  # tuning or not
    monkeypatch.delenv("FFCL_TUNE")
    assert pick("forward", *operands, measure=never) == CHOICES[-1]
    assert pick("forward", operands[0], operands[0], measure=never) == CHOICES[0]  # another shape class


def test_of_a_call_with_ids_only_the_tiles_with_masks_are_timed(operands, monkeypatch):
    """The launch without masks may have any part of such a call, none included, and keeps its tile meanwhile."""
    monkeypatch.setenv("FFCL_TUNE", "1")
    apart, meet = (share for share in shares(False, ops.EXCLUDE_SAME_ID))
    masked, seen = config.candidates("forward", "sm90", "half", 512, ids=True), []

    def measure() -> float:
        tiles = [share.tile(*operands, never) for share in (apart, meet)]
        seen.append(tiles)
        return -len(seen)

    assert apart.tile(*operands, never) == CHOICES[0]
    assert meet.tile(*operands, measure) == masked[-1]
    assert seen == [[CHOICES[0], tile] for tile in masked]
    assert list(cached()) == ["forward/ids/half/512/4096x2048"]


def test_what_another_process_has_stored_since_stays(operands, monkeypatch):
    monkeypatch.setenv("FFCL_TUNE", "1")
    times = {tile: float(len(CHOICES) - i) for i, tile in enumerate(CHOICES)}
    pick("forward", *operands, measure=timer(times, []))
    other = cached() | {"forward/half/64/512x512": asdict(CHOICES[0])}
    tuning.cache_file(torch.device("cpu")).write_text(json.dumps(other))
    pick("forward", operands[0], operands[0], measure=timer(times, []))
    assert cached() == other | {"forward/half/512/4096x4096": asdict(CHOICES[-1])}


def test_the_cache_is_of_this_device_and_these_kernels(monkeypatch):
    before = tuning.cache_file(torch.device("cpu"))
    monkeypatch.setattr(tuning, "source_hash", lambda: "of other kernels")
    assert tuning.cache_file(torch.device("cpu")) != before
    assert "Made_up_H200" in before.name and before.parent.name == "cache"


def test_no_timing_inside_a_graph(operands, monkeypatch):
    monkeypatch.setenv("FFCL_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pick("forward", *operands, measure=never) == CHOICES[0]


def test_a_tile_that_does_not_fit_loses(operands, monkeypatch):
    monkeypatch.setenv("FFCL_TUNE", "1")

    def measure() -> float:
        if tuning._override["forward"] == CHOICES[0]:
            raise tuning.triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    assert pick("forward", *operands, measure=measure) == CHOICES[1]


@pytest.mark.parametrize("damage", ["{", "[1]", '{"a": 3}', '{"a": {"rows": 1}}', '{"a": {"no such field": 1}}'])
def test_a_damaged_cache_is_reported_and_ignored(operands, damage, caplog):
    path = tuning.cache_file(torch.device("cpu"))
    path.parent.mkdir()
    path.write_text(damage)
    assert pick("forward", *operands, measure=never) == CHOICES[0]
    assert "cannot read the tuning results" in caplog.text


def test_only_candidates_are_taken_from_the_cache(operands):
    path = tuning.cache_file(torch.device("cpu"))
    path.parent.mkdir()
    path.write_text(json.dumps({"forward/half/512/4096x2048": asdict(replace(CHOICES[1], rows=512))}))
    assert pick("forward", *operands, measure=never) == CHOICES[0]


def test_a_folder_that_cannot_be_written_costs_a_warning(operands, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FFCL_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("FFCL_TUNE", "1")
    times = {tile: 1.0 for tile in CHOICES}
    assert pick("forward", *operands, measure=timer(times, [])) == CHOICES[0]
    assert "cannot store tuning results" in caplog.text
