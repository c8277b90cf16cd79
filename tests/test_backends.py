"""The choice of a backend and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ffcl_fast import backends, ops
from ffcl_fast.backends import native

ROOT = Path(__file__).resolve().parent.parent
# Families of the stored records by the operator that they time.
FAMILIES = {
    "similarity_forward": {"clip"},
    "similarity_backward": {"clip"},
    "class_sums": {"sup_con"},
    "normalize_forward": {"nt_xent"},  # whose rows it normalises
    "goodness_forward": {"goodness_normalize"},
    "pair_cosine_forward": {"pair_cosine"},
}


@pytest.mark.parametrize("op", ("similarity_forward", "similarity_backward", "siglip"))
@pytest.mark.parametrize("name", ("reference", "panels", "cpu"))
def test_every_cpu_backend_has_the_similarity_operators(op, name):
    module = backends.load(name)
    assert module.unavailable(op, torch.zeros(1)) is None
    assert callable(getattr(module, op)) and callable(module.cache_size)
    assert backends.get(name, op, torch.zeros(1)) is module


def test_auto_on_the_cpu():
    assert backends.get("auto", "siglip", torch.zeros(1)) is backends.load("cpu")
    assert backends.get("auto", "siglip", torch.zeros(1, dtype=torch.float64)) is backends.load("reference")
    for dtype in (torch.float32, torch.float64):
        name, reason = backends.choose("siglip", "cpu", dtype)
        assert name in backends.BACKENDS and reason


def test_auto_on_a_gpu_takes_only_what_a_measurement_has_confirmed(monkeypatch):
    bf16, hopper = torch.bfloat16, (9, 0)
    monkeypatch.setattr(backends, "CONFIRMED", ())
    for op in ("similarity_forward", "goodness_forward"):
        assert backends.choose(op, "cuda", bf16, (512, 64), hopper)[0] == "panels"
    row = backends.Confirmed("triton", ("similarity_forward",), hopper, (bf16,), 1024, "results/some-gpu.json")
    monkeypatch.setattr(backends, "CONFIRMED", (row,))
    fits = "similarity_forward", "cuda", bf16, (512, 1024), hopper
    assert backends.choose(*fits) == ("triton", "confirmed by results/some-gpu.json")
    for i, other in ((0, "siglip"), (1, "cpu"), (2, torch.float16), (3, (512, 1025)), (3, ()), (4, (8, 0)), (4, None)):
        assert backends.choose(*fits[:i], other, *fits[i + 1 :])[0] in ("panels", "cpu")


def test_auto_falls_back_where_its_choice_cannot_run(monkeypatch, caplog):
    monkeypatch.setattr(backends, "choices", lambda *_: iter([("triton", "confirmed by results/some-gpu.json")]))
    with caplog.at_level("DEBUG", "ffcl_fast.backends"):
        module = backends.get("auto", "siglip", torch.zeros(3, 5, dtype=torch.float64))
    assert module is backends.load("panels")
    assert "panels (triton was chosen, confirmed by results/some-gpu.json, but is not taken here: " in caplog.text


def test_auto_takes_cuda_kernels_for_large_blocks_of_wide_rows():
    """On a Hopper chip, unless pairs are left out by id; Triton's elsewhere."""

    def choose(op, width, rows, cols=1 << 20, by_ids=False, alone=False):
        pairs = backends.Pairs(by_ids, cols, alone)
        return backends.choose(op, "cuda", torch.bfloat16, (rows, width), (9, 0), pairs)[0]

    for op, width, widest, rows in (
        ("similarity_forward", 200, 4096, 8192), ("similarity_backward", 512, 512, 65536),
    ):  # fmt: skip
        for case in ((width, rows), (widest, rows), (width, 1 << 20, rows)):
            assert choose(op, *case) == "cuda"
        for case in ((width - 1, rows), (width, rows - 1), (width, rows, rows - 1)):
            assert choose(op, *case) == choose(op, width, rows, by_ids=True) == "triton"
    assert choose("similarity_backward", 513, 65536) == "triton"
    assert choose("similarity_forward", 512, 65536, alone=True) == "cuda"
    assert choose("similarity_backward", 512, 65536, alone=True) == "triton"


def test_auto_takes_the_first_that_fits_and_runs(monkeypatch, caplog):
    confirmed = [backends.Confirmed(name, ("siglip",), (9, 0), (torch.bfloat16,), 64, name) for name in "abc"]
    monkeypatch.setattr(backends, "CONFIRMED", confirmed)
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    problems = {"a": "no compiler", "c": None, "panels": None}
    modules = {name: SimpleNamespace(unavailable=lambda op, x, name=name: problems[name]) for name in problems}
    modules["b"] = SimpleNamespace(unavailable=lambda op, x: None, doubtful=lambda x: "slow")
    monkeypatch.setattr(backends, "load", modules.__getitem__)
    with caplog.at_level("DEBUG", "ffcl_fast.backends"):
        assert backends.get("auto", "siglip", OnGpu) is modules["c"]
    told = "{} was chosen, confirmed by {}, but is not taken here: {}"
    told = "; ".join(("c (confirmed by c", told.format("a", "a", "no compiler"), told.format("b", "b", "slow")))
    assert told + ")" in caplog.text
    problems["c"] = "no driver"
    assert backends.get("auto", "siglip", OnGpu) is modules["panels"]


@pytest.mark.parametrize("op", ("similarity_forward", "similarity_backward"))
def test_auto_takes_cuda_kernels_where_triton_cannot_run(op, monkeypatch, hopper):
    for name in ("unavailable", "doubtful"):
        monkeypatch.setattr(backends.load("cuda"), name, lambda *_: None)
    monkeypatch.setattr(backends.load("triton"), "doubtful", lambda x: "there is no C compiler")
    for pairs in (backends.Pairs(False, 3), backends.Pairs(True, 1 << 20)):
        assert backends._auto(op, OnGpu, pairs)[0] == "cuda"


@pytest.mark.parametrize("backend", ("auto", "cuda", "triton"))
def test_a_number_of_rows_that_is_not_known_yet(backend, monkeypatch, hopper):
    """As torch.compile has it after an indexing by data."""
    monkeypatch.setattr(native, "module", SimpleNamespace(cuda_built=lambda: True, sm90_built=lambda: True))
    monkeypatch.setattr(backends.load("cuda"), "chip", lambda device: SimpleNamespace(capability=90))
    monkeypatch.setattr(backends.load("cuda"), "_built_for", lambda capability: True)
    with FakeTensorMode(shape_env=ShapeEnv()) as fake:
        rows = fake.shape_env.create_unbacked_symint()
        q = torch.empty(rows, 512, dtype=torch.bfloat16, device="cuda")
        scale = torch.empty((), device="cuda")
        lse = torch.ops.ffcl_fast.similarity_forward(q, None, scale, None, None, ops.EXCLUDE_NONE, False, True, backend)
        assert [x.shape[0].node.expr for x in (lse[0], lse[2])] == [rows.node.expr] * 2


@pytest.mark.parametrize("alone", (False, True))
@pytest.mark.parametrize("by_ids", (False, True))
def test_similarity_operators_tell_what_the_choice_asks(by_ids, alone, monkeypatch):
    asked = []
    real = backends.get
    monkeypatch.setattr(backends, "get", lambda *args: asked.append(args[3]) or real(*args))
    q, k = torch.randn(4, 8), None if alone else torch.randn(5, 8)
    ids = torch.arange(4), None if alone else torch.arange(5)
    head = q, k, torch.ones(()), *ids, ops.EXCLUDE_SAME_ID if by_ids else ops.EXCLUDE_DIAGONAL
    lse = torch.ops.ffcl_fast.similarity_forward(*head, not alone, True, "cpu")
    grads = [torch.ones_like(x) for x in lse[:2]]
    torch.ops.ffcl_fast.similarity_backward(*head, *lse[:2], *grads, lse[2], True, True, "cpu")
    assert asked == [backends.Pairs(by_ids, 4 if alone else 5, alone)] * 2


class OnGpu:
    """What the choice looks at of a tensor on a Hopper chip."""

    is_cuda, device, dtype, shape = True, torch.device("cuda", 0), torch.bfloat16, torch.Size((3, 64))


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a Hopper chip, Triton and a C compiler, as far as the choice can tell."""
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends.load("triton"), "unavailable", lambda op, x: None)
    monkeypatch.setattr(backends.load("triton"), "doubtful", lambda x: None)


def test_auto_normalises_by_a_kernel_only_where_one_is_confirmed(monkeypatch, hopper):
    x = torch.zeros(3, 5)
    assert backends.normalizes("triton", x)
    assert not any(backends.normalizes(name, x) for name in ("auto", "cpu", "cuda", "panels", "reference"))
    monkeypatch.setattr(backends, "CONFIRMED", ())
    assert not backends.normalizes("auto", OnGpu)
    row = backends.Confirmed("triton", ("normalize_forward",), (9, 0), (torch.bfloat16,), 4096, "results/some-gpu.json")
    monkeypatch.setattr(backends, "CONFIRMED", (row,))
    assert backends.normalizes("auto", OnGpu) and not backends.normalizes("auto", x)


def test_kernels_for_the_positives(monkeypatch, hopper):
    """By their own backend, beside the CUDA kernels, and by "auto" where confirmed; never on a CPU."""
    assert [backends.positives(name, OnGpu) for name in ("auto", "triton", "cuda", "panels")] == ["triton"] * 3 + [None]
    assert backends.positives("auto", torch.zeros(3, 5)) is None
    monkeypatch.setattr(backends, "CONFIRMED", ())
    assert backends.positives("auto", OnGpu) is None


@pytest.mark.parametrize("row", backends.CONFIRMED, ids=lambda row: f"{row.backend}-{row.ops[0]}")
def test_what_is_confirmed_has_a_record_and_a_kernel(row):
    """Every operator exists in the backend, and the cited file has a time of it by that backend."""
    records = json.loads((ROOT / row.evidence).read_text())["records"]
    measured = {r["family"] for r in records if r["provider"] == row.backend and "seconds" in r.get("time", {})}
    assert measured & FAMILIES[row.ops[0]], f"{row.evidence} has no time of {row.ops[0]} by {row.backend}"
    timed = [r for r in records if r["provider"] == row.backend and "seconds" in r.get("time", {})]
    shapes = [r["shape"] for r in timed if r["family"] in FAMILIES[row.ops[0]]]
    assert not row.fewest or any(n == row.fewest and row.narrowest <= d <= row.widest for n, d in shapes)
    assert all(hasattr(backends.load(row.backend), op) for op in row.ops)
    assert all(x.itemsize == 2 for x in row.dtypes)  # what was measured


def test_auto_tells_its_reason_at_debug_level(caplog):
    with caplog.at_level("DEBUG", "ffcl_fast.backends"):
        backends.get("auto", "siglip", torch.zeros(3, 5))
    assert caplog.messages == ["siglip of (3, 5) on cpu torch.float32: cpu (CPU tensors)"]


def test_unknown_names():
    with pytest.raises(ValueError, match="'reference'.*got 'tpu'"):
        backends.get("tpu", "siglip", torch.zeros(1))
    with pytest.raises(RuntimeError, match="backend='panels' cannot run no_such_operator on cpu"):
        backends.get("panels", "no_such_operator", torch.zeros(1))


def test_backends_for_gpus_keep_the_same():
    """ "auto" may take one forward and another backward."""
    assert len({backends.load(name).cache_size for name in ("cuda", "triton", "panels")}) == 1


def test_cache_sizes_are_what_is_returned():
    for name in ("reference", "panels", "cpu"):
        for q, k in ((torch.randn(40, 8), torch.randn(30, 8)), (torch.randn(40, 8), None)):
            arguments = (q, k, torch.tensor(3.0), None, None, ops.EXCLUDE_NONE, True)
            module = backends.load(name)
            assert module.similarity_forward(*arguments, True)[2].numel() == module.cache_size(q, k)
            assert module.similarity_forward(*arguments, False)[2].numel() == 0


def test_the_cpu_backend_without_its_compiled_part(monkeypatch):
    """It falls back to the row panels, which need nothing but PyTorch."""
    from ffcl_fast.backends import native, panels

    monkeypatch.setattr(native, "module", None)
    q, k = torch.randn(20, 8), torch.randn(30, 8)
    arguments = (q, k, torch.tensor(3.0), None, None, ops.EXCLUDE_NONE, True, False)
    for a, b in zip(backends.load("cpu").similarity_forward(*arguments), panels.similarity_forward(*arguments),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ("triton", "cuda"))
def test_a_sample_too_long_for_32_bit_places_is_refused(name):
    module = backends.load(name)
    longest = torch.zeros(()).expand(2, 2**31)  # one element of memory
    most = {"cuda": 2**30 - 1, "triton": 2**31 - 1}[name]
    problem = f"a sample may have at most {most} elements, these have 2147483648"
    assert module.unavailable("goodness_forward", longest) == problem
    assert module.unavailable("pool_goodness_forward", longest.unflatten(1, (2, 2**30))) == problem
    assert "elements" not in (module.unavailable("goodness_forward", longest[:, :most]) or "")
