"""The queue of keys: what it holds, that it is read in place, that it is saved."""

from __future__ import annotations

import io

import pytest
import torch
from processes import run
from torch.nn.functional import normalize

import ffcl_fast as ff


def test_is_negative_keys_without_a_copy():
    queue = ff.Queue(12, 5)
    loss = ff.InfoNCELoss(0.2, decoupled=False)
    query, key = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    before = queue.keys.clone()
    expected_query = query.detach().clone().requires_grad_()
    expected = loss(expected_query, key, before)
    expected.backward()
    value = loss(query, key, queue)
    address = queue.bank.data_ptr()
    queue.enqueue(key)
    value.backward()  # of the rows of its forward pass although keys were enqueued since
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(query.grad, expected_query.grad)
    assert torch.equal(queue.keys[:4], normalize(key)) and torch.equal(queue.keys[4:], before[4:])
    assert queue.keys.data_ptr() == address


def test_a_late_backward_is_right():
    """Two losses of different queues, one backward pass after both."""
    queue = ff.Queue(6, 5)
    loss = ff.InfoNCELoss(0.5)
    a, b = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    expected_a, expected_b = (x.detach().clone().requires_grad_() for x in (a, b))
    (loss(expected_a, b.detach(), queue.keys.clone())).backward()
    first = loss(a, b.detach(), queue)
    queue.enqueue(b)
    (loss(expected_b, a.detach(), queue.keys.clone())).backward()
    second = loss(b, a.detach(), queue)
    queue.enqueue(a)
    (first + second).backward()
    torch.testing.assert_close(a.grad, expected_a.grad)
    torch.testing.assert_close(b.grad, expected_b.grad)


def test_keeps_the_last_keys():
    queue = ff.Queue(5, 3)
    rows = normalize(torch.randn(20, 3))
    for first, last in ((0, 3), (3, 6), (6, 7), (7, 19)):  # round the end, and more than it holds
        queue.enqueue(rows[first:last])
    kept = queue.keys
    order = kept[:, 0].argsort(), rows[14:19, 0].argsort()
    torch.testing.assert_close(kept[order[0]], rows[14:19][order[1]])
    assert int(queue.position) == 19 % 5


def test_is_saved():
    queue = ff.Queue(6, 3)
    queue.enqueue(torch.randn(4, 3))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    other = ff.Queue(6, 3)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.keys, queue.keys) and int(other.position) == 4


def test_wrong_arguments():
    for size, dim in ((0, 3), (3, 0), (2.5, 3)):
        with pytest.raises(ValueError):
            ff.Queue(size, dim)
    with pytest.raises(ValueError, match="keys"):
        ff.Queue(4, 3).enqueue(torch.randn(2, 4))
    with pytest.raises(ValueError, match="paired"):
        ff.InfoNCELoss(negative_mode="paired")(torch.randn(2, 3), torch.randn(2, 3), ff.Queue(4, 3))


def test_across_processes(seed):
    """Uneven batches: both hold the same queue, and the gradients are those of one process."""
    for problems in run(2, _spread, seed):
        assert not problems, problems


def _spread(rank: int, world: int, seed: int) -> list[str]:
    torch.manual_seed(seed)
    queue = ff.Queue(9, 5, dtype=torch.float64)
    query, key = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    whole = query.clone().requires_grad_()
    truth = ff.InfoNCELoss(0.3)(whole, key, queue)
    truth.backward()
    own = slice(0, 3) if rank == 0 else slice(3, 7)
    mine = query[own].clone().requires_grad_()
    share = ff.InfoNCELoss(0.3, distributed="auto")(mine, key[own], queue)
    queue.enqueue(key[own])
    share.backward()
    total = share.detach().clone()
    torch.distributed.all_reduce(total)
    problems = []
    if not torch.allclose(total / world, truth):
        problems.append("value")
    if not torch.allclose(mine.grad / world, whole.grad[own]):  # the factor that DDP's averaging takes out
        problems.append("gradient")
    if not torch.allclose(queue.keys[:7], normalize(key)):
        problems.append("queue")
    return problems
