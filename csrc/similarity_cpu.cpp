// Similarity kernels for the CPU: row and column log-sum-exp, their gradient, and SigLIP, by panels of S.
//
// S is visited in panels of at most 384 rows by 2304 columns. Each panel takes three steps, each split into tasks that
// write disjoint memory, with a fixed order of every sum, so results do not depend on the number of threads:
//   pack      copies of the panel's rows and columns in the order the register tiles read them: float32, or pairs of
//             bfloat16 where bfloat16 rows meet an instruction set that multiplies those (tile.h, tile_amx.h)
//   scores    register tiles of S, and on them, before they leave the registers, one exponential an element; the
//             forward pass keeps row and column sums only, the backward pass writes the gradient panel G
//   products  dq[rows] += G k[columns] and dk[columns]^T += q[rows]^T G, reading G (3.5 MB, in L3) twice
// Bound by the multiply-add units: 1 unit of 2 N M D operations forward, 3 backward (half a unit and 1.5 for k = q,
// where only panels on or above the diagonal exist). The exponential costs about 12 instructions against 2 D / VW.
// What the tiles read next from L3 is prefetched by hand: 7 to 14 % on Zen 3. AMX multiplies so fast that loads and the
// exponential's epilogue are the limit there, at more than three times AVX-512's speed.
//
// Exponentials are taken against one constant offset for the whole call wherever the norms of the rows bound S tightly
// enough (docs/mathematics.md), else against running maxima.

#include "similarity.h"

#include <cmath>

#include "tile.h"

namespace ffcl {
namespace FFCL_ISA_NS {
namespace {

constexpr int64_t CACHE_HEADER = 16;  // mode, offset; then row sums and maxima, column ones, panels
constexpr double LOG2E = 1.4426950408889634;
constexpr double LN2 = 0.6931471805599453;
constexpr float NOTHING = -1e30f;  // a maximum of nothing: finite, so that differences are defined

// |S| log2(e) <= bound. Up to CERTAIN every sum against the offset bound - 64 is above 2^-110: no row is lost and its
// inverse, times any gradient, is finite. Up to WORTH_TRYING rows are rarely lost and the sums tell: below SMALLEST_SUM
// the terms lost to underflow could matter.
constexpr double CERTAIN = 87, WORTH_TRYING = 200, SMALLEST_SUM = 0x1p-70;

// Keeps the largest possible 2^(t - offset) near 2^64, so that sums over 2^32 terms are finite.
int32_t offset_of(double bound) { return static_cast<int32_t>(std::lround(bound)) - 64; }

#include "similarity_engine.h"
#include "similarity_epilogues.h"

// ---------------------------------------------------------------------------------------------------------------------

// Running sums of 2^(t - max) for N rows and M columns; the maximum is a constant where `max` holds one value.
struct Normalizers {
  Buffer<double> sum, max;
  int64_t count;
  Normalizers(int64_t n, bool online) : sum(n), max(online ? n : 0), count(n) {
    if (failed()) return;
    for (int64_t i = 0; i < n; ++i) sum[i] = 0;
    for (int64_t i = 0; max.data && i < n; ++i) max[i] = NOTHING;
  }
  bool failed() const { return sum.failed || max.failed; }

  void add(int64_t first, int64_t n, const float* sums, const float* maxima) {
    if (!max.data) {
      for (int64_t i = 0; i < n; ++i) sum[first + i] += sums[i];
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      double &m = max[first + i], &s = sum[first + i];
      const double other = maxima[i], larger_max = m > other ? m : other;
      s = s * std::exp2(m - larger_max) + sums[i] * std::exp2(other - larger_max);
      m = larger_max;
    }
  }
  double smallest() const {
    double least = __builtin_inf();
    for (int64_t i = 0; i < count; ++i) least = sum[i] < least ? sum[i] : least;
    return least;
  }
  void keep(float* cache) const {
    for (int64_t i = 0; i < count; ++i) {
      cache[i] = static_cast<float>(sum[i]);
      cache[count + i] = max.data ? static_cast<float>(max[i]) : 0;
    }
  }
  void write(double offset, float* lse) const {
    for (int64_t i = 0; i < count; ++i)
      lse[i] = static_cast<float>(LN2 * ((max.data ? max[i] : offset) + std::log2(sum[i])));
  }
};

// One pass over S into `rows` and, if `both`, `cols`; against `offset`, or running maxima where it is null.
int accumulate(Engine& e, bool both, const int32_t* offset, Normalizers& rows, Normalizers* cols, float* panels,
               int64_t capacity) {
  const bool online = !offset;
  const int64_t chunks = e.cb / (e.tile_chunk * NR) + 1, row_tasks = e.rb / ROW_TASK;
  Buffer<float> row_sum(chunks * e.rb), row_max(online ? chunks * e.rb : 0);
  Buffer<float> col_sum(row_tasks * e.cb), col_max(online ? row_tasks * e.cb : 0);
  if (row_sum.failed || row_max.failed || col_sum.failed || col_max.failed) return out_of_memory;
  Partials parts{row_sum, row_max, col_sum, col_max, e.rb, e.cb};
  int64_t used = 0;
  e.for_each_panel(
      true,
      [&](const Panel& p) {
        e.pack_rows(p, true, false);
        const int64_t size = p.size();
        float* keep = panels && used + size <= capacity ? panels + used : nullptr;
        if (keep) used += size;
        if (online)
          e.scores(p, e.log2_scale, OnlineSums(parts));
        else if (keep)
          e.scores(p, e.log2_scale, ConstantSums<true>(parts, *offset, keep));
        else
          e.scores(p, e.log2_scale, ConstantSums<false>(parts, *offset, nullptr));
        const int64_t col_tasks = (p.tiles + e.tile_chunk - 1) / e.tile_chunk;
        for (int64_t t = 0; t < col_tasks; ++t)
          rows.add(p.r0, p.rows, row_sum + t * e.rb, online ? row_max + t * e.rb : nullptr);
        const int64_t skip = p.first_both * NR;
        if ((both || e.self) && skip < p.cols)
          for (int64_t t = 0; t < (p.rows_padded + ROW_TASK - 1) / ROW_TASK; ++t)
            (e.self ? rows : *cols)
                .add(p.c0 + skip, p.cols - skip, col_sum + t * e.cb + skip,
                     online ? col_max + t * e.cb + skip : nullptr);
      },
      [](int64_t, int64_t) {});
  return ok;
}

}  // namespace

int similarity_forward(const Similarity& args, float* row_lse, float* col_lse, float* cache, int64_t cache_size) {
  Engine e(args, false);
  if (e.failed()) return out_of_memory;
  const bool both = col_lse && !e.self;
  const int64_t header = CACHE_HEADER + 2 * (args.rows + (e.self ? 0 : e.cols));
  if (cache && cache_size < header) return bad_argument;
  float* panels = cache ? cache + header : nullptr;
  const int64_t capacity = cache_size - header;
  const double bound = e.bound();
  const auto finish = [&](const Normalizers& rows, const Normalizers& cols, int32_t offset) {
    rows.write(offset, row_lse);
    if (both) cols.write(offset, col_lse);
    if (!cache) return ok;
    cache[0] = rows.max.data ? 0 : 1;
    cache[1] = static_cast<float>(offset);
    rows.keep(cache + CACHE_HEADER);
    if (both) cols.keep(cache + CACHE_HEADER + 2 * args.rows);
    return ok;
  };
  if (bound <= WORTH_TRYING) {
    const int32_t offset = offset_of(bound);
    Normalizers rows(args.rows, false), cols(both ? e.cols : 0, false);
    if (rows.failed() || cols.failed()) return out_of_memory;
    if (int status = accumulate(e, both, &offset, rows, &cols, panels, capacity)) return status;
    if (bound <= CERTAIN || (rows.smallest() >= SMALLEST_SUM && (!both || cols.smallest() >= SMALLEST_SUM)))
      return finish(rows, cols, offset);
  }
  Normalizers rows(args.rows, true), cols(both ? e.cols : 0, true);
  if (rows.failed() || cols.failed()) return out_of_memory;
  if (int status = accumulate(e, both, nullptr, rows, &cols, nullptr, 0)) return status;
  return finish(rows, cols, 0);
}

int similarity_backward(const Similarity& args, const float* row_lse, const float* col_lse, const float* row_grad,
                        const float* col_grad, const float* cache, int64_t cache_size, float* dq, float* dk) {
  if (!args.k && !dq) return bad_argument;
  Engine e(args, true);
  const bool columns = col_grad && !e.self;
  const int64_t padded_rows = args.rows + ROW_TASK, padded_cols = e.self ? 0 : e.cols + ROW_TASK;
  Buffer<float> row_factor(padded_rows), row_shift(padded_rows), col_factor(padded_cols), col_shift(padded_cols);
  if (e.failed() || row_factor.failed || row_shift.failed || col_factor.failed || col_shift.failed)
    return out_of_memory;

  // The forward pass left its choice in the cache; without one, any row that the constant offset could lose, or that
  // has no pair at all, takes the general form.
  bool constant;
  int32_t offset = 0;
  if (cache) {
    constant = cache[0] == 1;
    offset = static_cast<int32_t>(cache[1]);
  } else {
    const double bound = e.bound();
    constant = bound <= WORTH_TRYING;
    if (constant) offset = offset_of(bound);
    for (int64_t i = 0; constant && i < args.rows; ++i) constant = row_lse[i] * LOG2E - offset >= -100;
    for (int64_t j = 0; constant && columns && j < e.cols; ++j) constant = col_lse[j] * LOG2E - offset >= -100;
  }
  // grad / sum, to go with 2^(t - shift), where shift is the constant offset or the row's own maximum.
  const auto factors = [&](int64_t n, const float* grad, const float* lse, const float* kept, float* factor,
                           float* shift, int64_t padded) {
    for (int64_t i = 0; i < n; ++i) {
      const double u = static_cast<double>(grad[i]) * args.scale;
      const bool empty = lse[i] == -__builtin_inff();
      shift[i] = constant || empty ? 0 : kept ? kept[n + i] : static_cast<float>(lse[i] * LOG2E);
      const double sum = kept ? kept[i] : constant ? std::exp2(lse[i] * LOG2E - offset) : 1.0;
      factor[i] = empty ? 0 : static_cast<float>(u / sum);
    }
    for (int64_t i = n; i < padded; ++i) factor[i] = shift[i] = 0;
  };
  const float* kept = cache ? cache + CACHE_HEADER : nullptr;
  factors(args.rows, row_grad, row_lse, kept, row_factor, row_shift, padded_rows);
  if (columns)
    factors(e.cols, col_grad, col_lse, kept ? kept + 2 * args.rows : nullptr, col_factor, col_shift, padded_cols);
  else
    for (int64_t j = 0; j < padded_cols; ++j)  // 0 times an exponential that overflowed would be NaN
      col_factor[j] = 0, col_shift[j] = __builtin_inff();
  const Factors f{row_factor, row_shift,    e.self ? row_factor : col_factor, e.self ? row_shift : col_shift,
                  offset,     e.gradients()};

  const int64_t header = CACHE_HEADER + 2 * (args.rows + (e.self ? 0 : e.cols));
  if (cache && cache_size < header) return bad_argument;
  const float* panels = cache && constant ? cache + header : nullptr;
  const int64_t capacity = cache_size - header;
  int64_t used = 0;
  const bool need_k = dk || e.self;
  e.for_each_panel(
      !panels || e.kept_size() > capacity,
      [&](const Panel& p) {
        const int64_t size = p.size();
        const bool stored = panels && used + size <= capacity;
        e.pack_rows(p, !stored, need_k);
        if (stored)
          e.rescale(p, panels + used, f.row, f.col), used += size;
        else if (constant)
          e.scores(p, e.log2_scale, ConstantGradient(f));
        else
          e.scores(p, e.log2_scale, GeneralGradient(f));
        e.products(p, dq, need_k);
      },
      [&](int64_t c0, int64_t c1) {
        if (need_k) e.flush_columns(c0, c1, e.self ? dq : dk);
      });
  return ok;
}

int siglip(const Similarity& args, float bias, bool positives, float* loss, float* dbias, float* dq, float* dk) {
  const bool gradients = dq || dk;
  Engine e(args, gradients);
  const int64_t chunks = e.cb / (e.tile_chunk * NR) + 1;
  Buffer<double> loss_part(e.rb / ROW_TASK * chunks), bias_part(e.rb / ROW_TASK * chunks);
  if (e.failed() || loss_part.failed || bias_part.failed) return out_of_memory;
  double loss_sum = 0, bias_sum = 0;
  e.for_each_panel(
      true,
      [&](const Panel& p) {
        e.pack_rows(p, true, dk != nullptr);
        e.scores(p, args.scale,
                 SigmoidLoss(bias, args.scale, positives ? smaller(args.rows, e.cols) : 0, loss_part, bias_part, chunks,
                             gradients ? e.gradients() : Gradients{}));
        for (int64_t r = 0; r < (p.rows_padded + ROW_TASK - 1) / ROW_TASK; ++r)
          for (int64_t c = 0; c < (p.tiles + e.tile_chunk - 1) / e.tile_chunk; ++c) {
            loss_sum += loss_part[r * chunks + c];
            bias_sum += bias_part[r * chunks + c];
          }
        if (gradients) e.products(p, dq, dk != nullptr);
      },
      [&](int64_t c0, int64_t c1) {
        if (dk) e.flush_columns(c0, c1, dk);
      });
  *loss = static_cast<float>(loss_sum);
  *dbias = static_cast<float>(bias_sum);
  return ok;
}

}  // namespace FFCL_ISA_NS
}  // namespace ffcl
