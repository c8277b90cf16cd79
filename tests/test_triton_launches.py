"""What the Triton backend launches, without a GPU: kept plans choose what Triton would choose. No kernel runs."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from triton.runtime.jit import JITFunction  # noqa: E402

from ffcl_fast import functional as fn  # noqa: E402
from ffcl_fast.backends.triton import config, launch  # noqa: E402
from ffcl_fast.functional.similarity import normalized  # noqa: E402
from tools import host_time  # noqa: E402


@pytest.fixture
def launches():
    if not isinstance(launch.id_range_kernel, JITFunction):
        pytest.skip("Triton's interpreter launches nothing")
    with host_time.without_a_gpu() as counted:
        yield counted


@pytest.fixture
def compared(launches, monkeypatch):
    """Every launch is made a second time by Triton's own way, which must come to the same kernel and arguments. The
    list gets whether each came from a kept choice."""
    kept = []
    call = launch.Launch.__call__

    def both_ways(self, *tensors, grid=None, scalars=None):
        kept.append(self.compiled is not None)
        call(self, *tensors, grid=grid, scalars=scalars)
        given = self.compiled.arguments
        scalars, grid = self.scalars if scalars is None else scalars, self.grid if grid is None else grid
        chosen = self.kernel.run(*tensors, *scalars, grid=grid, warmup=False, **self.constants)
        assert chosen is self.compiled, f"{chosen.name}: kept was another choice than Triton's"
        assert all(a is b or a == b for a, b in zip(given, chosen.arguments, strict=True)), chosen.name

    monkeypatch.setattr(launch.Launch, "__call__", both_ways)
    return kept


def off(x: torch.Tensor, elements: int) -> torch.Tensor:
    """x again, so many elements after a multiple of 16 bytes."""
    room = x.new_empty(x.numel() + elements)
    return room[elements:].view(x.shape).copy_(x.detach()).requires_grad_(x.requires_grad)


def rows(n: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(n, width).to(dtype).requires_grad_()


def differentiated(step, *leaves: torch.Tensor) -> None:
    """``step()`` and its gradients, for each choice of the leaves that want one."""
    for wanted in itertools.product((True, False), repeat=len(leaves)):
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want)
        out = step()
        if out.requires_grad:
            out.backward()


def pair_loss(a, b, **options):
    return fn.pair_cosine(a, b, off(torch.ones(a.shape[0]), options.pop("at")), backend="triton", **options)


LOSSES = {
    "clip": lambda a, b, s, ids: fn.clip(a, b, s, backend="triton"),
    "clip, ids": lambda a, b, s, ids: fn.clip(a, b, s, ids=ids, backend="triton"),
    "nt_xent": lambda a, b, s, ids: fn.nt_xent(a, b, s, backend="triton"),
    "nt_xent, each": lambda a, b, s, ids: fn.nt_xent(a, b, s, reduction="none", backend="triton").sum(),
    "sup_con": lambda a, b, s, ids: fn.sup_con(torch.stack((a, b), 1), ids, backend="triton"),
    "info_nce": lambda a, b, s, ids: fn.info_nce(a, b, torch.cat((b, b)), s, backend="triton"),
    "siglip": lambda a, b, s, ids: fn.siglip(a, b, s, -10.0, backend="triton"),
    "lse": lambda a, b, s, ids: fn.similarity_lse(a, b, s, backend="triton")[1].sum(),
    "lse of itself": lambda a, b, s, ids: fn.similarity_lse(a, None, s, exclude="diagonal", backend="triton")[0].sum(),
    "lse, ids": lambda a, b, s, ids: fn.similarity_lse(
        a, b, s, row_ids=ids, col_ids=ids, exclude="different_id", both=False, backend="triton"
    )[0].sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_similarity_launches_are_triton_s_own_choice(compared, name):
    for n, width, dtype in ((64, 64, torch.bfloat16), (65, 512, torch.float16), (1030, 200, torch.float32)):
        for at in itertools.product((0, 1, 8), repeat=3):
            a, b = off(rows(n, width, dtype), at[0]), off(rows(n, width, dtype), at[1])
            scale = off(torch.full((1,), 10.0, requires_grad=True), at[2])
            ids = off(torch.arange(n) // 2, at[1])
            differentiated(lambda a=a, b=b, s=scale, ids=ids: LOSSES[name](a, b, s, ids), a, b, scale)
    assert compared.count(True) > 2 * compared.count(False) > 0


@pytest.mark.parametrize("shape", [(64, 64), (33, 200), (3, 1 << 15), (5, 8, 7, 7), (2, 64, 96, 96)])
def test_goodness_launches_are_triton_s_own_choice(compared, shape):
    for dtype, at, more in itertools.product((torch.bfloat16, torch.float32), (0, 1, 8), (0, 1)):
        h, other = (off(torch.randn(shape).to(dtype).requires_grad_(), i) for i in (at, more))
        g, out = fn.goodness_and_normalize(h, relu=True, backend="triton")
        torch.autograd.grad((g, out), h, (off(torch.ones_like(g), more), off(torch.ones_like(out), at)))
        g = fn.goodness(h, "mean_squares", backend="triton")
        torch.autograd.grad(g, h, off(torch.ones_like(g), more))
        for reduction in ("mean", "none"):
            pair = h.detach(), other.detach()
            differentiated(lambda p=pair, i=more, how=reduction: pair_loss(*p, at=i, reduction=how).sum(), *pair)
        if len(shape) > 2:
            for x in (h, h.contiguous(memory_format=torch.channels_last)):
                g, pooled = fn.pool_goodness(x, backend="triton")
                torch.autograd.grad((g, pooled), h, (off(torch.ones_like(g), more), torch.ones_like(pooled)))
        else:
            z = normalized(h, dtype, backend="triton")
            torch.autograd.grad(z, h, off(torch.ones_like(z), more))
    assert compared.count(True) > compared.count(False) > 0


@pytest.mark.parametrize("shapes", [[(64, 64)], [(33, 200), (64, 8, 7, 7), (65, 512)], [(70, 24)] * 40, [(1, 1 << 16)]])
def test_launches_of_many_layers_are_triton_s_own_choice(compared, shapes):
    for dtype, at, more in itertools.product((torch.bfloat16, torch.float32), (0, 1, 8), (0, 1)):
        layers = [off(torch.randn(s).to(dtype), (at, more)[i % 2]) for i, s in enumerate(shapes)]
        for wanted in (layers, layers[::2]):
            for x in wanted:
                x.requires_grad_()
            g = torch.cat(fn.goodness_many(layers, relu=bool(more), backend="triton"))
            torch.autograd.grad(g, wanted, off(torch.ones_like(g), more))
    assert compared.count(True) > compared.count(False) > 0


@pytest.mark.parametrize("sizes", [(64, 64, 96), (33, 200, 65), (300, 13, 4100)])
def test_launches_of_a_linear_layer_are_triton_s_own_choice(compared, monkeypatch, sizes):
    n, width, out = sizes
    if n == 300:
        monkeypatch.setattr(config, "WORKSPACE", 1 << 14)  # several chunks of rows, the last one shorter
    for dtype, at in itertools.product((torch.bfloat16, torch.float32), itertools.product((0, 1, 8), repeat=3)):
        x, weight, bias = (
            off(torch.randn(s).to(dtype), i) for s, i in zip(((n, width), (out, width), (out,)), at, strict=True)
        )
        for kind, given in (("sum_squares", bias), ("mean_squares", None)):
            fn.linear_goodness(x, weight, given, kind, relu=given is None, backend="triton")
    assert compared.count(True) > compared.count(False) > 0


def test_a_second_call_asks_triton_for_nothing(launches, monkeypatch):
    def step():
        a, b = rows(64, 512), rows(64, 512)
        fn.clip(a, b, torch.tensor(10.0, requires_grad=True), backend="triton").backward()
        fn.nt_xent(a, b, backend="triton").backward()
        pair_loss(a, b, at=0).backward()
        sum(fn.goodness_many([a, b[:, :64]], backend="triton"))[0].backward()
        fn.linear_goodness(a.detach(), b.detach(), backend="triton")
        return dict(launches)

    first = step()
    assert first["sums_kernel"] == 2 and first["product"] == 3
    monkeypatch.setattr(JITFunction, "run", None)
    launches.clear()
    assert step() == first


def test_kinds_tell_apart_what_triton_compiles_for():
    x = torch.zeros(4, 16)
    same = launch.kinds(x, None)
    assert launch.kinds(torch.ones(4, 16), None) == same
    others = x.double(), x[:, :8], x[:3], off(x, 1), x.to("meta")
    assert all(launch.kinds(other, None) != same for other in others) and launch.kinds(x, x) != same


@pytest.mark.parametrize(("size", "wide"), [(2**31 - 1, False), (2**31, True)])
def test_sizes_past_32_bits_are_another_plan(size, wide):
    assert launch.beyond_32_bits(0, size) == (False, wide)


def test_host_time_prints_a_line_a_workload(launches, capsys):
    host_time.main(["--only", "clip,pair cosine", "--seconds", "0.01"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["workload", "launches", "forward", "both", "2", "threads", "microseconds"]
    assert lines[1].startswith("nothing") and len(lines) == 2 + 5 + 2
    with pytest.raises(SystemExit):
        host_time.main(["--only", "clap"])
    assert "clap" in capsys.readouterr().err
