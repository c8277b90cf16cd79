"""What holds for every function alike: determinism, threads, processes, memory, no waiting for the device."""

from __future__ import annotations

import ast
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import every_loss
import forked
import pytest
import torch
from every_loss import LOSSES
from torch._dynamo import compiled_autograd as _compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ffcl_fast.functional as fn
from ffcl_fast import backends, ops
from ffcl_fast.backends import native

ROOT = Path(__file__).resolve().parent.parent
_ops = torch.ops.ffcl_fast


def _leaves(seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return tuple(x.requires_grad_() for x in every_loss.inputs())


def _everything(seed: int = 0) -> dict[str, list[torch.Tensor]]:
    return {name: every_loss.run(name, _leaves(seed)) for name in LOSSES}


def _different(a: dict, b: dict) -> list[str]:
    return [n for n in a if len(a[n]) != len(b[n]) or not all(map(torch.equal, a[n], b[n]))]


# (arguments without the backend) of every operator
def _arguments() -> dict[str, tuple]:
    q, k = torch.randn(7, 5), torch.randn(6, 5)
    scale, ids = torch.tensor(3.0), (torch.arange(7) % 3, torch.arange(6) % 3)
    head = (q, k, scale, *ids, ops.EXCLUDE_SAME_ID)
    row, col, cache = _ops.similarity_forward(*head, True, True, "cpu")
    h, maps = torch.randn(4, 9), torch.randn(3, 4, 5)
    g, out = _ops.goodness_forward(h, False, True, True, 0.1, "cpu")
    pooled = _ops.pool_goodness_forward(maps, True, False, "cpu")[1]
    target = torch.tensor([1.0, -1.0, 1.0, -1.0])
    coefficients = _ops.pair_cosine_forward(h, out, target, 0.0, False, 1.0, True, True, "cpu")[1]
    z, norm = _ops.normalize_forward(h, 1e-12, torch.bfloat16, "panels")
    odds = _ops.positive_odds(q[:6], k, scale, row[:6], col, ops.POSITIVE_GIVEN, False, "panels")
    sums = _ops.class_sums(q, ids[0], None, 3, "panels")
    return {
        "positive_odds": (q[:6], None, scale, row[:6], col[:0], ops.POSITIVE_STACKED, True),
        "add_positives_": (q[:6], k, scale, row[:6], *odds[1:], q[:6].clone(), k.clone(), ops.POSITIVE_GIVEN),
        "class_sums": (q, ids[0], row, 3),
        "class_odds": (q, *sums, ids[0], scale, row),
        "add_class_positives": (q, sums[0], sums[0], sums[1], ids[0], scale, row, row, q.clone()),
        "normalize_forward": (h, 1e-12, torch.bfloat16),
        "normalize_backward": (z, norm, z.clone(), 1e-12, torch.float32),
        "similarity_forward": (*head, True, False),
        "similarity_backward": (*head, row, col, row, col, cache, True, True),
        "siglip": (q[:6], k, scale, -scale, True, True, False),
        "goodness_forward": (h, True, True, True, 0.1),
        "goodness_backward": (h, g, g, out, False, True, 0.1),
        "pair_cosine_forward": (h, out, target, 0.0, True, 0.5, True, False),
        "pair_cosine_backward": (h, out, coefficients, g, True, True, False),
        "scale_": (h.clone(), torch.tensor(2.0)),
        "pool_goodness_forward": (maps, False, True),
        "pool_goodness_backward": (maps, pooled, torch.randn(3), None, False, True),
        "goodness_many": ([h, q], True, False),
        "goodness_many_backward": ([h, q], torch.randn(11), True, False),
        "linear_goodness": (q, k, torch.randn(6), True, True),
    }


def test_opcheck_of_every_operator():
    arguments = _arguments()
    names = {
        n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("ffcl_fast::")
    }
    files = [path for path in (ROOT / "tests").glob("test_*.py") if path.name != Path(__file__).name]
    others = [path.read_text(encoding="utf-8") for path in files]
    missing = {n for n in names - set(arguments) if not any("opcheck" in text and n in text for text in others)}
    assert set(arguments) <= names and not missing, f"not checked here, nor in another test: {missing}"
    utils = ("test_schema", "test_faketensor")
    for name, values in arguments.items():
        # On a CPU other operators hold these.
        backend = "panels" if name.startswith("normalize") or "positive" in name else "auto"
        torch.library.opcheck(getattr(_ops, name).default, (*values, backend), test_utils=utils)


def test_deterministic_algorithms_are_honoured():
    """No complaint, and the same bits; PyTorch then also fills every fresh tensor with NaN."""
    before = _everything()
    torch.use_deterministic_algorithms(True)
    try:
        assert not _different(before, _everything())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", LOSSES)
def test_only_requested_gradients_are_given(name):
    wanted = iter(every_loss.run(name, _leaves())[1:])
    for i in range(5):
        results = _alone(name, i)
        assert results[0].isfinite() and len(results) == 1 + (i in every_loss.LEAVES[name])
        if len(results) == 2:
            torch.testing.assert_close(results[1], next(wanted), rtol=1e-5, atol=1e-6)
    nothing = LOSSES[name](*(x.detach() for x in _leaves()))
    assert not nothing.requires_grad


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "margin_sup_con"])  # plain PyTorch
def test_a_second_derivative_is_refused(name):
    leaves = _leaves()
    wanted = [leaves[i] for i in every_loss.LEAVES[name]]
    gradients = torch.autograd.grad(LOSSES[name](*leaves), wanted, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        sum(x.sum() for x in gradients if x is not None).backward()


# Of the embeddings or maps, whatever else is constant: PyTorch would take what it finds no way to for zero.
@pytest.mark.parametrize(
    ("name", "leaf"),
    [(name, i) for name in LOSSES if name != "margin_sup_con" for i in every_loss.LEAVES[name] if i < 3],
)
def test_a_hessian_vector_product_is_refused(name, leaf):
    leaves = [x.detach() for x in _leaves()]

    def loss(x):
        return LOSSES[name](*leaves[:leaf], x, *leaves[leaf + 1 :])

    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.functional.hvp(loss, leaves[leaf], torch.ones_like(leaves[leaf]))


RETAINED = {
    "siglip": lambda x, y: fn.siglip(x, y, 3.0, -1.0),
    "pair_cosine": lambda x, y: fn.pair_cosine(x, y, torch.ones(len(x))) * 5,
    "clip": lambda x, y: fn.clip(x, y, 3.0),
}


@pytest.mark.parametrize("name", RETAINED)
def test_passes_over_one_graph_are_alike(name):
    """Those of a traced backward pass too, which runs again on what the first one had."""
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(20, 8)

    def passes(count: int) -> list[torch.Tensor]:
        z = torch.nn.functional.normalize(x @ weight, dim=1)
        value = RETAINED[name](z, z.flip(0))
        return [torch.autograd.grad(value, weight, retain_graph=True)[0] for _ in range(count)]

    true = passes(1)[0]
    with _compiled_autograd._enable(torch.compile(backend="eager")):
        traced = passes(3)
    z = torch.nn.functional.normalize(x @ weight, dim=1)
    value = RETAINED[name](z, z.flip(0))
    batched = torch.autograd.grad(value, weight, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0]
    for found in (*passes(3), *traced, batched[0], batched[1] / 2):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("name", RETAINED)
def test_a_whole_step_can_be_compiled(name):
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(20, 8)

    def step() -> None:
        z = torch.nn.functional.normalize(x @ weight, dim=1)
        value = RETAINED[name](z, z.flip(0))
        value.backward(retain_graph=True)
        value.backward()

    step()
    true, weight.grad = weight.grad, None
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")()
    torch.testing.assert_close(weight.grad, true)


class _Gradients(TorchDispatchMode):
    """Counts the elements of gradients that our operators make."""

    OUTPUTS = {"contrast_backward": slice(3), "siglip": slice(1, 3), "pair_cosine_forward": slice(2, 4)}

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if space == "ffcl_fast" and (name.endswith("_backward") or name in self.OUTPUTS):
            parts = out if isinstance(out, tuple | list) else (out,)
            self.elements += sum(x.numel() for x in parts[self.OUTPUTS.get(name, slice(None))])
        return out


# How often an input comes in, 1 where not listed: both views are one matrix, it is anchor and key, it is passed twice.
TIMES = {"nt_xent": 2, "sup_con": 2, "sup_con one": 3, "info_nce queue": 2, "pool_goodness": 2, "layerwise": 2}


@pytest.mark.parametrize("name", LOSSES)
def test_only_requested_gradients_are_computed(name):
    """Those of the scale and the bias come with the queries' gradient."""
    for i in every_loss.LEAVES[name]:
        with _Gradients() as made:
            _alone(name, i)
        leaf = _leaves()[i if i < 3 else 0]
        assert made.elements <= leaf.numel() * TIMES.get(name, 1), i


def test_unrequested_gradients_would_be_seen():
    with _Gradients() as made:
        every_loss.run("clip", _leaves())
    assert made.elements == 2 * every_loss.N * every_loss.D


def _alone(name: str, index: int) -> list[torch.Tensor]:
    return every_loss.run(name, tuple(x.detach().requires_grad_(i == index) for i, x in enumerate(_leaves())))


@pytest.mark.parametrize("name", LOSSES)
def test_no_input_is_changed(name):
    leaves = _leaves()
    before = [x.detach().clone() for x in leaves]
    every_loss.run(name, leaves)
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


# ------------------------------------------------------------------------------------------- no waiting for the device


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Tensors without data that say they are on a GPU: reading a number back from one raises."""
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_nothing_back_from_the_device(name, pretended_gpu):
    leaves = tuple(x.requires_grad_() for x in every_loss.inputs("cuda"))
    value = LOSSES[name](*leaves)
    assert value.device.type == "cuda" and value.requires_grad


CHECKED = ("pair_cosine", "pair_cosine rows", "layerwise", "goodness of groups")  # on a CPU they look at their targets


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_reads_nothing_back(name, pretended_gpu, monkeypatch):
    """The same for the backward pass; as CPU tensors without data, since autograd will not pretend a GPU."""
    if name in CHECKED:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    leaves = tuple(x.requires_grad_() for x in every_loss.inputs())
    assert len(every_loss.run(name, leaves)) > 1


def test_what_reads_back_would_be_seen(pretended_gpu):
    with pytest.raises(Exception, match="[Dd]ata.?dependent|_local_scalar_dense"):
        bool(torch.ones(3, device="cuda").sum() > 1)


READING = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "is_nonzero"}


def test_backends_of_a_gpu_read_nothing_back():
    """By their source: what a launch needs of the device stays there; only timing, when asked for, waits."""
    found = []
    folder = Path(fn.__file__).parents[1] / "backends"
    for path in [
        *folder.glob("triton/*.py"),
        *folder.glob("cuda*.py"),
        folder / "panels.py",
        *folder.glob("panels_*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READING:
                found.append(f"{path.name}:{node.lineno} {node.func.attr}")
    assert not [f for f in found if not f.startswith("launch.py")], found


# ------------------------------------------------------------------------------------------------ threads and processes


def test_python_threads_at_once():
    expected, wrong = [_everything(seed) for seed in range(4)], []
    inputs = [_leaves(seed) for seed in range(4)]

    def work(number: int) -> None:
        for _ in range(3):
            leaves = tuple(x.detach().requires_grad_() for x in inputs[number])
            wrong.extend(_different(expected[number], {name: every_loss.run(name, leaves) for name in LOSSES}))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _child(numbers: list, sender) -> None:
    torch.set_num_threads(2)
    sender.send([[x.numpy() for x in values] for values in _everything(3).values()])
    sender.close()


def test_a_process_of_its_own_computes_the_same(monkeypatch):
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.setattr(sys, "path", [*paths.split(os.pathsep), *sys.path])
    torch.set_num_threads(2)
    expected = _everything(3)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=([], sender))
    process.start()
    sender.close()
    results = receiver.recv()
    process.join()
    ours = {name: [torch.from_numpy(x) for x in values] for name, values in zip(expected, results, strict=True)}
    assert not _different(expected, ours)


@pytest.mark.skipif(native.module is None, reason="ffcl_fast was built without its compiled part")
@pytest.mark.parametrize("work", forked.WORK)
def test_a_fork_computes_the_same(work):
    """Forward and backward, before the fork and in it; tests/forked.py kills a child that hangs."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(ROOT / "tests" / "forked.py"), work]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


GROWTH = """
import gc, sys, torch
import every_loss
torch.manual_seed(0)
leaves = tuple(x.requires_grad_() for x in every_loss.inputs())
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4
def tensors():
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
names = list(every_loss.LOSSES)
def calls(count):
    for i in range(count):
        every_loss.run(names[i % len(names)], leaves)
calls(1000)
before = resident(), tensors()
calls(int(sys.argv[1]))
print(resident() - before[0], tensors() - before[1])
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_ten_thousand_calls_leave_no_memory_behind():
    """A tensor of 1.5 kB lost in each call would be 15 MB; 10,000 over all functions, of each in `make test-long`."""
    calls = 10_000 * (len(LOSSES) if os.environ.get("FFCL_LONG") else 1)
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GROWTH, str(calls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kilobytes, tensors = map(int, done.stdout.split())
    assert kilobytes < 4096 and tensors == 0
