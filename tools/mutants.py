"""The mutants of `make mutate`: what is broken on purpose, and the smallest tests that must see it.

A mutant replaces ``old``, which occurs once in ``file``, by ``new``. ``kind``: "cpu" rebuilds the native module,
"cuda" the emulated one, "triton" runs under Triton's interpreter, "python" needs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    kind: str
    what: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.what}"


_SIM, _ENGINE = "csrc/similarity_cpu.cpp", "csrc/similarity_engine.h"
_EPI, _GOOD = "csrc/similarity_epilogues.h", "csrc/goodness_cpu.cpp"
_OPS = "tests/test_ops.py -k 'cpu and {}'"
_TRITON = "ffcl_fast/backends/triton/"
_INTERPRETED = "tests/interpreter/similarity.py -k '{}'"
_FN = "ffcl_fast/functional/"

MUTANTS = (
    # --- the CPU kernels
    Mutant(
        "cpu",
        "the tail of rows is masked one row late",
        _ENGINE,
        "bool out = i0 + r >= p.rows ||",
        "bool out = i0 + r > p.rows ||",
        _OPS.format("test_similarity and float32"),
    ),
    Mutant(
        "cpu",
        "tiles that stick out by columns go unmasked",
        _ENGINE,
        "|| (j + 1) * NR > p.cols) return true;",
        "|| j * NR > p.cols) return true;",
        _OPS.format("test_similarity and float32"),
    ),
    Mutant(
        "cpu",
        "the diagonal is left out beside itself",
        _ENGINE,
        "if (!out && a.exclude == Exclude::diagonal) out = i == j;",
        "if (!out && a.exclude == Exclude::diagonal) out = i == j + 1;",
        _OPS.format("test_exclusions"),
    ),
    Mutant(
        "cpu",
        "ids are compared by their low 32 bits",
        _ENGINE,
        "ids_exact = ids_exact && out[i] == ids[i];",
        "ids_exact = true;",
        "tests/test_similarity_cpu.py -k beyond_32",
    ),
    Mutant(
        "cpu",
        "the gradient lacks its scale",
        _SIM,
        "const double u = static_cast<double>(grad[i]) * args.scale;",
        "const double u = static_cast<double>(grad[i]);",
        _OPS.format("test_similarity and float32"),
    ),
    Mutant(
        "cpu",
        "row and column factors swapped",
        _SIM,
        "const Factors f{row_factor, row_shift,    e.self ? row_factor : col_factor, e.self ? row_shift : col_shift,",
        "const Factors f{e.self ? row_factor : col_factor, e.self ? row_shift : col_shift, row_factor, row_shift,",
        _OPS.format("test_similarity and float32"),
    ),
    Mutant(
        "cpu",
        "the block on the diagonal of k = q counts twice",
        _ENGINE,
        "p.first_both = self && r0 >= c0 ? smaller(p.tiles, rb / NR) : 0;",
        "p.first_both = 0;",
        _OPS.format("test_similarity and float32 and q-q"),
    ),
    Mutant(
        "cpu",
        "running sums are not rescaled",
        _SIM,
        "s = s * std::exp2(m - larger_max) +",
        "s = s +",
        "tests/test_similarity_cpu.py -k 'running_maxima'",
    ),
    Mutant(
        "cpu",
        "rows that the constant offset lost are kept",
        _SIM,
        "SMALLEST_SUM = 0x1p-70;",
        "SMALLEST_SUM = 0;",
        _OPS.format("(far_below or test_scales)"),
    ),
    Mutant(
        "cpu",
        "column gradients of a block start from the last block's",
        _SIM,
        "e.flush_columns(c0, c1, e.self ? dq : dk, e.self);\n        if (c1 < e.cols) e.clear_columns();",
        "e.flush_columns(c0, c1, e.self ? dq : dk, e.self);",
        _OPS.format("test_many_tiles"),
    ),
    Mutant(
        "cpu",
        "a coefficient of the exponential is off in its fifth digit",
        "csrc/simd.h",
        "splat(6.9314720e-1f)",
        "splat(6.9316720e-1f)",
        _OPS.format("test_similarity and float32"),
    ),
    Mutant(
        "cpu",
        "bfloat16 outputs are cut, not rounded",
        "csrc/simd.h",
        "const vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
        "const vi rounded = bits >> 16;",
        "tests/test_rounding.py",
    ),
    Mutant(
        "cpu",
        "SigLIP's positives are negatives",
        _EPI,
        "z[d] = 1.0f;",
        "z[d] = -1.0f;",
        _OPS.format("test_siglip and float32"),
    ),
    Mutant(
        "cpu",
        "the gradient of a mean lacks its 2",
        _GOOD,
        "double along_a = grad_goodness ? grad_goodness[row] * (mean ? 2.0 / in.dim : 2.0) : 0.0;",
        "double along_a = grad_goodness ? grad_goodness[row] * (mean ? 1.0 / in.dim : 2.0) : 0.0;",
        "tests/test_goodness.py -k 'test_goodness_operator and cpu'",
    ),
    Mutant(
        "cpu",
        "ReLU passes the gradient of what it cut",
        _GOOD,
        "return relu && a <= 0 ? 0.0f : grad;",
        "return relu && a < 0 ? 0.0f : grad;",
        "tests/test_goodness.py -k 'test_goodness_operator and cpu'",
    ),
    Mutant(
        "cpu",
        "the second gradient of a pair is projected by the first's norm",
        _GOOD,
        "c[2] = static_cast<float>(w * cosine / m2);",
        "c[2] = static_cast<float>(w * cosine / m1);",
        "tests/test_pair_cosine.py -k 'operator and cpu'",
    ),
    Mutant(
        "cpu",
        "a pool's gradient is not shared among the positions",
        _GOOD,
        "values[c] = sum / static_cast<float>(in.positions);",
        "values[c] = sum;",
        "tests/test_goodness.py -k 'test_pool_operator and cpu'",
    ),
    Mutant(
        "cpu",
        "arguments that no kernel may follow are followed",
        "csrc/cpu_dispatch.cpp",
        "if (!valid(args) || !row_lse || !valid_cache(args, cache, cache_size)) return bad_argument;",
        "",
        "tests/test_fuzz.py -k binding",
    ),
    # --- the Triton kernels, interpreted
    Mutant(
        "triton",
        "the tail of columns goes unmasked",
        _TRITON + "tiles.py",
        "needed = (row + BLOCK_ROWS > rows) | (col + BLOCK_COLS > cols)",
        "needed = (row + BLOCK_ROWS > rows)",
        _INTERPRETED.format("test_forward_of_rows or smallest"),
    ),
    Mutant(
        "triton",
        "the diagonal counts twice where k is q",
        _TRITON + "similarity_forward.py",
        "t = tl.where(above == 0, t - 1.0, t)",
        "pass",
        _INTERPRETED.format("test_forward and self"),
    ),
    Mutant(
        "triton",
        "rows that the offset lost are not rescued",
        _TRITON + "similarity_forward.py",
        'lost = mask & ((total < lost_below) | (total == float("inf")))',
        "lost = mask & (total < 0)",
        _INTERPRETED.format("rescues"),
    ),
    Mutant(
        "triton",
        "the gradient in registers lacks its scale",
        _TRITON + "similarity_backward.py",
        "acc *= scale_value * tl.load(frame + 2) / GAIN",
        "acc *= tl.load(frame + 2) / GAIN",
        _INTERPRETED.format("few_rows or test_gradient and both"),
    ),
    Mutant(
        "triton",
        "a column's factor is its row's",
        _TRITON + "similarity_backward.py",
        "y_part = load_vector(y_vectors, 2, col, cols, BLOCK_COLS)",
        "y_part = load_vector(x_vectors, 2, row, rows, BLOCK_COLS)",
        _INTERPRETED.format("few_rows or test_gradient and both"),
    ),
    Mutant(
        "triton",
        "what rounding took from a normaliser is lost",
        _TRITON + "similarity_backward.py",
        "* factor * tl.exp2(lost)",
        "* factor * tl.exp2(-lost)",
        _INTERPRETED.format("test_gradient"),
    ),
    Mutant(
        "triton",
        "SigLIP's positives keep the gradient of negatives",
        _TRITON + "siglip.py",
        "g = tl.where(r[:, None] == c[None, :], -g, g)",
        "pass",
        _INTERPRETED.format("test_siglip"),
    ),
    Mutant(
        "triton",
        "the gradient of a mean is that of a sum",
        _TRITON + "goodness.py",
        "            p *= inverse_width",
        "            p *= 1.0",
        "tests/interpreter/goodness.py -k 'test_goodness'",
    ),
    Mutant(
        "triton",
        "tiles whose ranges of ids overlap at one end go unmasked",
        _TRITON + "tiles.py",
        "needed = needed | ((x_low <= y_high) & (y_low <= x_high))",
        "needed = needed | ((x_low <= y_low) & (y_high <= x_high))",
        _INTERPRETED.format("common_id and pair"),
    ),
    Mutant(
        "triton",
        "the ids of columns are those of rows",
        _TRITON + "launch.py",
        "return rows, rows if col_ids is None or col_ids is row_ids else _ranges(col_ids, tile.grain)",
        "return rows, rows",
        _INTERPRETED.format("common_id and pair"),
    ),
    Mutant(
        "triton",
        "a row is not its positive's positive",
        _TRITON + "positives.py",
        "both += share_of(grad, slope, col_slope, other, mask, grad_stride) * factor",
        "both += weight",
        "tests/interpreter/positives.py -k test_positives",
    ),
    Mutant(
        "triton",
        "a small loss is rounded to nothing",
        _TRITON + "positives.py",
        "tail = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))",
        "tail = tl.log(u)",
        "tests/interpreter/positives.py -k small_losses",
    ),
    Mutant(
        "triton",
        "an infinite logit is a loss of 0",
        _TRITON + "positives.py",
        "- logit + logit * 0.0",
        "- logit",
        "tests/interpreter/positives.py -k not_finite",
    ),
    # --- the CUDA kernels, compiled for the CPU
    Mutant(
        "cuda",
        "a partial sum of rows is left out",
        "csrc/similarity_sm80.cu",
        "row_sums[i] + row_sums[MAX_SPAN * TILE + i];",
        "row_sums[i];",
        "tests/test_cuda_similarity.py -k 'test_pair and sm80'",
    ),
    Mutant(
        "cuda",
        "the rescue asks the mask for the mirrored pair",
        "csrc/similarity_sm80.cu",
        "if (!(is_col ? kept(whole, other, own) : kept(whole, own, other))) continue;",
        "if (!(is_col ? kept(whole, own, other) : kept(whole, own, other))) continue;",
        "tests/test_cuda_similarity.py -k 'rescue or without_a_pair'",
    ),
    Mutant(
        "cuda",
        "a long row's last packs are read once too few",
        "csrc/goodness_rows.cuh",
        "for (int64_t i = lane + KEEP * LANES; i < packs; i += LANES) add(P::load(h + i * N));",
        "for (int64_t i = lane + KEEP * LANES; i < packs - 1; i += LANES) add(P::load(h + i * N));",
        "tests/test_cuda_goodness.py -k test_goodness",
    ),
    Mutant(
        "cuda",
        "the second gradient of a pair is projected by the first's norm",
        "csrc/pair_cosine.cu",
        "g2.x[j] = masked<T>(h2, c[0] * a1 - c[2] * a2, relu);",
        "g2.x[j] = masked<T>(h2, c[0] * a1 - c[1] * a2, relu);",
        "tests/test_cuda_goodness.py -k pair_cosine",
    ),
    Mutant(
        "cuda",
        "a group reads its sums before its last products are done",
        "csrc/similarity_sm90.cu",
        "products_wait<0>();",
        "products_wait<1>();",
        "tests/test_cuda_similarity.py -k 'test_pair and sm90'",
    ),
    Mutant(
        "cuda",
        "the groups do not wait for their turn",
        "csrc/similarity_sm90.cu",
        "if (n > 0) barrier_wait(ring.turn, (n - 1) % 2);",
        "",
        "tests/test_cuda_similarity.py -k 'test_pair and sm90'",
    ),
    Mutant(
        "cuda",
        "a failed launch goes on to the next",
        "csrc/similarity_sm80.cu",
        "if (status != ok) return status;\n    FinishArgs",
        "FinishArgs",
        "tests/test_cuda_launches.py -k 'any_launch and similarity_forward'",
    ),
    # --- the functions, and the losses across processes
    Mutant(
        "python",
        "the positive pulls the wrong way",
        _FN + "contrast.py",
        "weight = share * -scale",
        "weight = share * scale",
        "tests/test_functional.py -k 'gradcheck and info_nce and panels'",
    ),
    Mutant(
        "python",
        "self-similarity's gradient of the scale counts twice",
        _FN + "similarity.py",
        "return total / 2 if k is None else total",
        "return total",
        "tests/test_functional.py -k 'gradcheck_losses and nt_xent and panels'",
    ),
    Mutant(
        "python",
        "a row of zeros is projected",
        _FN + "similarity.py",
        "inner = (z.to(norm.dtype) * dz).sum(-1, keepdim=True).mul_(norm > ctx.eps)",
        "inner = (z.to(norm.dtype) * dz).sum(-1, keepdim=True)",
        "tests/test_hard_numbers.py -k 'short'",
    ),
    Mutant(
        "python",
        "an anchor is its own positive",
        _FN + "contrastive.py",
        "rest, count = sums - own[:, 0], members * views - 1",
        "rest, count = sums, members * views",
        "tests/test_properties.py -k sup_con",
    ),
    Mutant(
        "python",
        "integers of class sums have no room for the sum",
        _FN + "class_sums.py",
        "bits = 62 - _bit_length(x.shape[0], x.device) - ",
        "bits = 62 - ",
        "tests/test_class_sums.py",
    ),
    Mutant(
        "python",
        "a class with an infinite element has a plausible sum",
        _FN + "class_sums.py",
        "+ lost[:, None]",
        "",
        "tests/test_class_sums.py",
    ),
    Mutant(
        "python",
        "the weight of a pair is not shared among the rows",
        _FN + "pair_cosine.py",
        'scale = float(weight) / rows if reduction == "mean" else float(weight)',
        "scale = float(weight)",
        "tests/test_properties.py -k 'pair_cosine'",
    ),
    Mutant(
        "python",
        "a second backward pass lacks the upstream gradient",
        _FN + "pair_cosine.py",
        "grad = (grad * scale).to(coefficients.dtype)",
        "grad = (grad * 0 + scale).to(coefficients.dtype)",
        "tests/test_pair_cosine.py -k every_use",
    ),
    Mutant(
        "python",
        "the processes opposite in a ring share a row",
        "ffcl_fast/distributed/similarity.py",
        "return whole[0], slice(rows[owner] // 2, rows[owner])",
        "return whole[0], slice(max(0, rows[owner] // 2 - 1), rows[owner])",
        "tests/test_across.py -k 'test_contract and 4'",
    ),
    Mutant(
        "python",
        "other processes' rows pass for positives",
        "ffcl_fast/distributed/pairwise.py",
        "pairs(everyone[cols], cols == mine)",
        "pairs(everyone[cols], True)",
        "tests/test_across.py -k 'test_contract and 2'",
    ),
    Mutant(
        "python",
        "the scale's gradient is a sum over processes",
        "ffcl_fast/distributed/pairwise.py",
        "return total / torch.distributed.get_world_size(ctx.group), None",
        "return total, None",
        "tests/test_across.py -k 'test_contract and 2'",
    ),
)
