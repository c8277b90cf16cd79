"""The machine that runs PTX (tools/ptx): small programs written by hand, and one kernel as Triton compiles it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tools.ptx.grid import execute
from tools.ptx.memory import Fault, GlobalMemory, TensorMap
from tools.ptx.program import Program

THREADS = 128
MODULE = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry test({parameters})
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<200>;
    .reg .b64 %rd<20>;
{body}
    ret;
}}
"""
WAIT = """
    {{ .reg .pred complete;
    again: mbarrier.try_wait.parity.shared.b64 complete, [{barrier}], {parity};
    @!complete bra.uni again; }}
"""
# %r0: the thread; %rd0: its float32 of the first parameter, a pointer.
PLACE = """
    mov.u32 %r0, %tid.x;
    ld.param.b64 %rd0, [p0];
    mul.wide.u32 %rd1, %r0, 4;
    add.s64 %rd0, %rd0, %rd1;
"""


def run(body, *arguments, shared=0, grid=(1, 1, 1)):
    """Run PTX with numpy arrays, TensorMaps and integers as parameters p0, p1, and so on."""
    memory, parameters, maps, declared = GlobalMemory(), [], {}, []
    for i, value in enumerate(arguments):
        if isinstance(value, np.ndarray):
            memory.add(value.ctypes.data, value.nbytes)
            parameters.append(value.ctypes.data)
        elif isinstance(value, TensorMap):
            maps[i] = value
            parameters.append(0)
        else:
            parameters.append(value)
        kind = ".align 64 .b8 p{}[128]" if isinstance(value, TensorMap) else ".u64 p{}"
        declared.append(".param " + kind.format(i))
    text = MODULE.format(parameters=", ".join(declared), threads=THREADS, body=body)
    execute(Program(text), grid, parameters, memory, shared, maps)


ADD = """
    mov.u32 %r1, %tid.x;
    ld.param.b32 %r2, [p3];
    ld.param.b64 %rd1, [p0];
    ld.param.b64 %rd2, [p1];
    ld.param.b64 %rd3, [p2];
$L__next:
    setp.lt.s32 %p1, %r1, %r2;
    mul.wide.s32 %rd4, %r1, 4;
    add.s64 %rd5, %rd1, %rd4;
    add.s64 %rd6, %rd2, %rd4;
    add.s64 %rd7, %rd3, %rd4;
    @%p1 ld.global.b32 {%r3}, [ %rd5 + 0 ];
    @%p1 ld.global.b32 {%r4}, [ %rd6 + 0 ];
    add.f32 %r5, %r3, %r4;
    @%p1 st.global.b32 [ %rd7 + 0 ], {%r5};
    add.s32 %r1, %r1, 128;
    @%p1 bra $L__next;
"""


def test_a_loop_adds_vectors():
    x, y = np.random.rand(2, 300).astype(np.float32)
    total = np.zeros_like(x)
    run(ADD, x, y, total, 300)
    np.testing.assert_array_equal(total, x + y)


def test_an_address_outside_is_named():
    x, y, total = np.zeros((3, 300), np.float32).copy()
    x = np.zeros(299, np.float32)
    with pytest.raises(Fault, match=f"{x.ctypes.data + x.nbytes:#x}(.|\n)*ld.global.b32 {{%r3}}(.|\n)*block .0, 0, 0."):
        run(ADD, x, y.copy(), total.copy(), 300)


def test_unknown_instructions_and_states_are_named():
    with pytest.raises(NotImplementedError, match="tanh.approx.f32 %r1, %r0"):
        run(PLACE + "tanh.approx.f32 %r1, %r0;", np.zeros(THREADS, np.float32))
    with pytest.raises(NotImplementedError, match="add.sat.f32"):
        run(PLACE + "add.sat.f32 %r1, %r0, %r0;", np.zeros(THREADS, np.float32))
    with pytest.raises(Fault, match="%r1 has never been written"):
        run(PLACE + "add.f32 %r2, %r0, %r1;", np.zeros(THREADS, np.float32))


def test_branches_meet_again():
    """A shuffle needs all of a warp, of which each half goes its own way before."""
    branch = """
    setp.lt.u32 %p1, %r0, 40;
    @%p1 bra $L__low;
    add.s32 %r1, %r0, 1000;
    bra.uni $L__both;
$L__low:
    mov.b32 %r1, %r0;
    {early}
$L__both:
    shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;
    st.global.b32 [%rd0], {{%r2}};
    """
    out = np.zeros(THREADS, np.uint32)
    run(PLACE + branch.format(early=""), out)
    other = np.arange(THREADS) ^ 16
    np.testing.assert_array_equal(out, np.where(other < 40, other, other + 1000))
    with pytest.raises(Fault, match="part of a warp"):
        run(PLACE + branch.format(early="shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;"), out)


def test_threads_exchange_through_shared_memory():
    out = np.zeros(THREADS, np.uint32)
    exchange = """
    mov.b32 %r1, global_smem;
    mad.lo.s32 %r2, %r0, 4, %r1;
    xor.b32 %r3, %r0, 127;
    mad.lo.s32 %r4, %r3, 4, %r1;
    setp.lt.u32 %p1, %r0, 64;
    @%p1 bra $L__write;
    mov.b32 %r0, 7;
$L__write:
    st.shared.b32 [%r2], %r0;
    {barrier}
    ld.shared.b32 %r5, [%r4];
    st.global.b32 [%rd0], {{%r5}};
    """
    run(PLACE + exchange.format(barrier="bar.sync 0;"), out, shared=4 * THREADS)
    np.testing.assert_array_equal(out, np.where(np.arange(THREADS) > 63, 127 - np.arange(THREADS), 7))
    with pytest.raises(Fault, match="outside shared memory"):
        run(PLACE + exchange.format(barrier="bar.sync 0;"), out, shared=4 * THREADS - 4)


def test_packed_and_narrow_numbers():
    """{low, high}; a source register that is wider than its type; a predicate of each half."""
    out = np.zeros((4, THREADS), np.uint32)
    body = """
    mov.b32 %r1, 0x3F80C000;
    mov.b32 %r2, 0x00000000;
    setp.le.bf16x2 %p1|%p2, %r1, %r2;
    selp.b32 %r3, 1, 0, %p1;
    selp.b32 %r4, 1, 0, %p2;
    mov.b64 %rd2, 0x5FFFFFFFE;
    cvt.s64.s32 %rd3, %rd2;
    mov.b64 {%r5, %r6}, %rd3;
    st.global.b32 [%rd0], {%r3};
    st.global.b32 [%rd0+512], {%r4};
    st.global.b32 [%rd0+1024], {%r5};
    st.global.b32 [%rd0+1536], {%r6};
    """
    run(PLACE + body, out)
    assert out[:, 0].tolist() == [1, 0, 0xFFFFFFFE, 0xFFFFFFFF]


LOAD = """
    mov.b32 %r1, global_smem;
    add.s32 %r2, %r1, 1024;
    setp.eq.u32 %p1, %r0, 0;
    mov.b64 %rd5, p1;
    cvta.param.u64 %rd6, %rd5;
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {bytes};
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd6, {{3, 5}}], [%r2];
    mad.lo.s32 %r3, %r0, 4, %r1;
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [%rd0], {{%r4}};
"""
AFTER = """
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [%rd0+512], {%r4};
    bar.sync 0;
    @%p1 mbarrier.inval.shared::cta.b64 [%r2];
"""


def matrix_and_map():
    """Boxes of 8 x 32 float32 of a 10 x 28 matrix with rows 40 apart."""
    matrix = torch.rand(10, 40).numpy()
    return matrix, TensorMap(matrix.view(np.uint8).ravel(), (10, 28), matrix.strides[0], 4, (8, 32), 0)


def test_a_box_has_arrived_only_after_the_wait():
    matrix, box = matrix_and_map()
    out = np.zeros((2, THREADS), np.float32)
    run(PLACE + LOAD.format(bytes=1024) + WAIT.format(barrier="%r2", parity=0) + AFTER, out, box, shared=1032)
    assert np.isnan(out[0]).all()
    expected = np.zeros((8, 32), np.float32)
    expected[:5, :25] = matrix[5:, 3:28]
    np.testing.assert_array_equal(out[1], expected.ravel()[:THREADS])


def test_a_wait_for_the_phase_before_waits_for_nothing():
    _, box = matrix_and_map()
    out = np.zeros((2, THREADS), np.float32)
    late = AFTER.replace("bar.sync 0;", WAIT.format(barrier="%r2", parity=0))
    run(PLACE + LOAD.format(bytes=1024) + WAIT.format(barrier="%r2", parity=1) + late, out, box, shared=1032)
    assert np.isnan(out).all()


@pytest.mark.parametrize("expected", [512, 2048])
def test_a_wait_that_can_never_end(expected):
    _, box = matrix_and_map()
    body = PLACE + LOAD.format(bytes=expected) + WAIT.format(barrier="%r2", parity=0)
    with pytest.raises(Fault, match="can never end(.|\n)*mbarrier.try_wait"):
        run(body, np.zeros((2, THREADS), np.float32), box, shared=1032)


def test_a_block_waits_for_its_loads():
    _, box = matrix_and_map()
    with pytest.raises(Fault, match="ends before its loads"):
        run(PLACE + LOAD.format(bytes=1024), np.zeros((2, THREADS), np.float32), box, shared=1032)


def swizzled(rows):
    """(n, 64) 16-bit numbers as wgmma reads them with 128-byte swizzling: atoms of 8 rows of 128 bytes, in which the
    16-byte chunk c of row r lies in place c ^ r (PTX ISA: Asynchronous wgmma: Shared Memory Matrix Layout)."""
    image = np.zeros((len(rows), 8, 8), np.uint16)
    for r, row in enumerate(rows):
        for c, chunk in enumerate(row.reshape(8, 8)):
            image[r, c ^ r % 8] = chunk
    return image.ravel()


def bf16(*shape):
    """(bits, float64 values) of random bfloat16."""
    x = torch.randn(*shape).bfloat16()
    return x.view(torch.int16).numpy().view(np.uint16), x.double().numpy()


def multiply(transposed, early="", wait=0):
    """PTX: 64 x 64 x 64 by wgmma, A and B in shared memory at 0 and 8192; p1 has their bytes, p0 takes the results."""
    registers = [f"%r{100 + i}" for i in range(32)]
    step = 128 if transposed else 2  # descriptor units of 16 bytes to the next 16 of k
    copies = "".join(
        f"ld.global.b32 {{%r4}}, [ %rd3 + {512 * i} ]; st.shared.b32 [%r3+{512 * i}], %r4;\n" for i in range(32)
    )
    products = "".join(
        f"wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{', '.join(registers)}}}, %rd{8 + i}, %rd{12 + i}, "
        f"{'%p2' if i else 0}, 1, 1, 0, {int(transposed)};\n"
        for i in range(4)
    )
    descriptors = "".join(
        f"add.s64 %rd{8 + i}, %rd6, {2 * i}; add.s64 %rd{12 + i}, %rd6, {512 + step * i};\n" for i in range(4)
    )
    stores = "".join(f"st.global.b32 [ %rd5 + {4 * i} ], {{{r}}};\n" for i, r in enumerate(registers))
    return f"""
    {PLACE}
    ld.param.b64 %rd2, [p1];
    mul.wide.u32 %rd4, %r0, 4;
    add.s64 %rd3, %rd2, %rd4;
    mov.b32 %r1, global_smem;
    mad.lo.s32 %r3, %r0, 4, %r1;
    {copies}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    bfe.u32 %r2, %r1, 4, 14;
    cvt.u64.u32 %rd6, %r2;
    or.b64 %rd6, %rd6, {1 << 62 | 64 << 32 | 1 << 16};
    mov.pred %p2, -1;
    {descriptors}
    wgmma.fence.sync.aligned;
    {products}
    wgmma.commit_group.sync.aligned;
    {early}
    wgmma.wait_group.sync.aligned {wait};
    ld.param.b64 %rd5, [p0];
    mul.wide.u32 %rd7, %r0, 128;
    add.s64 %rd5, %rd5, %rd7;
    {stores}
    wgmma.wait_group.sync.aligned 0;
    """


def operands(transposed):
    a, x = bf16(64, 64)
    b, y = bf16(64, 64)  # (k, n) if transposed
    bits = np.concatenate([swizzled(a), swizzled(b)])
    return bits, x @ (y if transposed else y.T), np.abs(x) @ np.abs(y if transposed else y.T)


@pytest.mark.parametrize("transposed", [False, True])
def test_wgmma_multiplies(transposed):
    bits, truth, size = operands(transposed)
    out = np.zeros((THREADS, 32), np.float32)
    run(multiply(transposed), out, bits, shared=16384)
    for thread in range(THREADS):
        warp, lane = divmod(thread, 32)
        for i in range(32):
            row, col = 16 * warp + lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2
            assert abs(out[thread, i] - truth[row, col]) <= 1e-6 * size[row, col]


def test_products_are_there_only_after_the_wait():
    bits, *_ = operands(False)
    out = np.zeros((THREADS, 32), np.float32)
    run(multiply(False, wait=1), out, bits, shared=16384)
    assert np.isnan(out).all()
    with pytest.raises(Fault, match="%r101 is written while"):
        run(multiply(False, early="mov.b32 %r101, 0;"), out, bits, shared=16384)
    with pytest.raises(Fault, match="written that a product still read"):
        run(multiply(False, early="mov.b32 %r4, 1; st.shared.b32 [%r3+8192], %r4;"), out, bits, shared=16384)


def test_a_kernel_as_triton_compiles_it():
    """Gradients of a 70 x 45 matrix of exponentials, 64 wide."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.runtime.jit import JITFunction

    from ffcl_fast.backends import triton as backend
    from ffcl_fast.backends.triton import launch as triton_launch

    if not isinstance(triton_launch.id_range_kernel, JITFunction):
        pytest.skip("Triton's interpreter compiles nothing")
    from tools.ptx import launch

    unavailable, compile_one = backend.unavailable, JITFunction._do_compile
    q, k = (torch.nn.functional.normalize(torch.randn(n, 64), dim=1).bfloat16() for n in (70, 45))
    s = 10 * q.double() @ k.double().T
    row_lse, col_lse = s.logsumexp(1).float(), s.logsumexp(0).float()
    row_grad, col_grad = torch.rand(70), torch.rand(45)
    before = launch.launches["rows_kernel"]
    with launch.installed():
        arguments = q, k, torch.tensor(10.0), None, None, 0, row_lse, col_lse, row_grad, col_grad, torch.empty(0)
        dq, dk = backend.similarity_backward(*arguments, True, True)
    assert launch.launches["rows_kernel"] > before
    assert (backend.unavailable, JITFunction._do_compile) == (unavailable, compile_one)
    grad = torch.exp(s - row_lse.double()[:, None]) * row_grad.double()[:, None]
    grad += torch.exp(s - col_lse.double()) * col_grad.double()
    for ours, truth in ((dq, 10 * grad @ k.double()), (dk, 10 * grad.T @ q.double())):
        assert float((ours.double() - truth).abs().max() / truth.abs().max()) < 0.01
