// What happens to a register tile of S (in units of log2) before it leaves the registers. Included by
// similarity_cpu.cpp inside its anonymous namespace, so every instruction set has its own copy.
//
// Each scores task owns one copy: begin, then for every column tile begin_columns, tile for each MR rows,
// end_columns, and at the last end. Excluded and padded pairs arrive as -inf.

// Where a task's partial sums go: rows by column chunk [chunk][rb], columns by row task [row task][cb].
struct Partials {
  float *row_sum, *row_max, *col_sum, *col_max;
  int64_t rb, cb;
};

// Sums of e = 2^(t - offset): one exponential serves the row and the column. Keeps e for the backward pass if asked.
template <bool keep>
struct ConstantSums {
  Partials out;
  int32_t offset;
  float* panel;  // [tile][row][NR]
  int64_t rt = 0, ct = 0;
  vf rows[ROW_TASK];
  vf cols[2];

  ConstantSums(const Partials& o, int32_t c, float* kept) : out(o), offset(c), panel(kept) {}
  void begin(const Panel&, int64_t row_task, int64_t chunk) {
    rt = row_task, ct = chunk;
    for (auto& r : rows) r = zero();
  }
  FFCL_INLINE void begin_columns() { cols[0] = cols[1] = zero(); }
  FFCL_INLINE void tile(const Panel& p, int64_t i, int64_t j, const Values& t) {
    float* to = keep ? panel + (j * p.rows_padded + i) * NR : nullptr;
    vf* row = rows + (i - rt * ROW_TASK);
    vf c0 = cols[0], c1 = cols[1];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const vf e0 = exp2(t.x[r][0], offset), e1 = exp2(t.x[r][1], offset);
      if (keep) store(to + r * NR, e0), store(to + r * NR + VW, e1);
      row[r] += e0 + e1;
      c0 += e0;
      c1 += e1;
    }
    cols[0] = c0, cols[1] = c1;
  }
  FFCL_INLINE void end_columns(const Panel&, int64_t j) {
    float* to = out.col_sum + rt * out.cb + j * NR;
    store(to, cols[0]), store(to + VW, cols[1]);
  }
  void end(const Panel& p) {
    const int64_t first = rt * ROW_TASK;
    for (int64_t i = first; i < smaller(p.rows_padded, first + ROW_TASK); ++i)
      out.row_sum[ct * out.rb + i] = sum(rows[i - first]);
  }
};

// Sums against running maxima, one per lane, so that nothing crosses lanes until the end: about 2.7 exponentials an
// element, for inputs whose range no constant offset covers. A NaN survives in the sums.
struct OnlineSums {
  Partials out;
  int64_t rt = 0, ct = 0;
  vf row_max[ROW_TASK], row_sum[ROW_TASK];
  vf col_max[2], col_sum[2];

  explicit OnlineSums(const Partials& o) : out(o) {}
  void begin(const Panel&, int64_t row_task, int64_t chunk) {
    rt = row_task, ct = chunk;
    for (int64_t i = 0; i < ROW_TASK; ++i) row_max[i] = splat(NOTHING), row_sum[i] = zero();
  }
  FFCL_INLINE void begin_columns() {
    col_max[0] = col_max[1] = splat(NOTHING);
    col_sum[0] = col_sum[1] = zero();
  }
  FFCL_INLINE void tile(const Panel&, int64_t i, int64_t, const Values& t) {
    const int64_t first = i - rt * ROW_TASK;
    for (int r = 0; r < MR; ++r) {
      vf& m = row_max[first + r];
      const vf top = max(max(m, t.x[r][0]), t.x[r][1]);
      row_sum[first + r] = row_sum[first + r] * exp2(m - top) + exp2(t.x[r][0] - top) + exp2(t.x[r][1] - top);
      m = top;
    }
    for (int h = 0; h < 2; ++h) {
      vf top = col_max[h];
      for (int r = 0; r < MR; ++r) top = max(top, t.x[r][h]);
      vf s = col_sum[h] * exp2(col_max[h] - top);
      for (int r = 0; r < MR; ++r) s += exp2(t.x[r][h] - top);
      col_sum[h] = s;
      col_max[h] = top;
    }
  }
  FFCL_INLINE void end_columns(const Panel&, int64_t j) {
    for (int h = 0; h < 2; ++h) {
      store(out.col_sum + rt * out.cb + j * NR + h * VW, col_sum[h]);
      store(out.col_max + rt * out.cb + j * NR + h * VW, col_max[h]);
    }
  }
  void end(const Panel& p) {
    const int64_t first = rt * ROW_TASK;
    for (int64_t i = first; i < smaller(p.rows_padded, first + ROW_TASK); ++i) {
      const vf m = row_max[i - first], s = row_sum[i - first];
      float top = m[0], total = 0;
      for (int l = 1; l < VW; ++l) top = m[l] > top ? m[l] : top;
      for (int l = 0; l < VW; ++l) total += s[l] * std::exp2(m[l] - top);
      out.row_max[ct * out.rb + i] = top;
      out.row_sum[ct * out.rb + i] = total;
    }
  }
};

// Per-row and per-column factors of the gradient, indexed by the global row and column.
struct Factors {
  const float *row, *row_shift, *col, *col_shift;
  int32_t offset;
  Gradients g;
};

// G = 2^(t - offset) (row factor + column factor).
struct ConstantGradient {
  Factors f;
  explicit ConstantGradient(const Factors& factors) : f(factors) {}
  void begin(const Panel&, int64_t, int64_t) {}
  void begin_columns() {}
  void end_columns(const Panel&, int64_t) {}
  void end(const Panel&) {}
  FFCL_INLINE void tile(const Panel& p, int64_t i, int64_t j, const Values& t) {
    const float* row = f.row + p.r0 + i;
    const float* col = f.col + p.c0 + j * NR;
    const vf b0 = load(col), b1 = load(col + VW);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r += 2) {
      const vf x0 = exp2(t.x[r][0], f.offset) * (splat(row[r]) + b0);
      const vf x1 = exp2(t.x[r][1], f.offset) * (splat(row[r]) + b1);
      const vf y0 = exp2(t.x[r + 1][0], f.offset) * (splat(row[r + 1]) + b0);
      const vf y1 = exp2(t.x[r + 1][1], f.offset) * (splat(row[r + 1]) + b1);
      f.g.put(p, i + r, j, x0, x1, y0, y1);
    }
  }
};

// G = row factor 2^(t - row shift) + column factor 2^(t - column shift): right for any range.
struct GeneralGradient {
  Factors f;
  explicit GeneralGradient(const Factors& factors) : f(factors) {}
  void begin(const Panel&, int64_t, int64_t) {}
  void begin_columns() {}
  void end_columns(const Panel&, int64_t) {}
  void end(const Panel&) {}
  FFCL_INLINE void tile(const Panel& p, int64_t i, int64_t j, const Values& t) {
    const int64_t row = p.r0 + i, col = p.c0 + j * NR;
    for (int r = 0; r < MR; r += 2) {
      vf x[2][2];
      for (int u = 0; u < 2; ++u)
        for (int h = 0; h < 2; ++h) {
          const vf s = t.x[r + u][h];
          const vf by_row = splat(f.row[row + r + u]) * exp2(s - splat(f.row_shift[row + r + u]));
          const vf by_col = load(f.col + col + h * VW) * exp2(s - load(f.col_shift + col + h * VW));
          x[u][h] = by_row + by_col;
        }
      f.g.put(p, i + r, j, x[0][0], x[0][1], x[1][0], x[1][1]);
    }
  }
};

// log(1 + e) for e in [0, 1], by 2 atanh(e / (2 + e)): its argument is at most 1/3, so seven terms reach 1e-8.
FFCL_INLINE vf log1p_unit(vf e) {
  const vf w = e / (e + splat(2.0f)), w2 = w * w;
  vf s = splat(1.0f / 13);
  s = s * w2 + splat(1.0f / 11);
  s = s * w2 + splat(1.0f / 9);
  s = s * w2 + splat(1.0f / 7);
  s = s * w2 + splat(1.0f / 5);
  s = s * w2 + splat(1.0f / 3);
  s = s * w2 + splat(1.0f);
  return splat(2.0f) * w * s;
}

// SigLIP: sum of softplus(-z x) with x = S + bias, and G = scale * its derivative by x.
struct SigmoidLoss {
  float bias, scale;
  int64_t positives;  // this many leading pairs (i, i) are positive
  double *loss_out, *bias_out;
  int64_t chunks;
  Gradients g;  // null: the loss alone
  int64_t rt = 0, ct = 0;
  vf loss_row, grad_row;
  double loss = 0, grad = 0;

  SigmoidLoss(float b, float s, int64_t p, double* lo, double* bo, int64_t n, Gradients panel)
      : bias(b), scale(s), positives(p), loss_out(lo), bias_out(bo), chunks(n), g(panel) {}
  void begin(const Panel&, int64_t row_task, int64_t chunk) { rt = row_task, ct = chunk; }
  FFCL_INLINE void begin_columns() { loss_row = grad_row = zero(); }
  FFCL_INLINE void tile(const Panel& p, int64_t i, int64_t j, const Values& t) {
    const bool diagonal = p.r0 + i < positives && p.crosses_diagonal(i, j);
    for (int r = 0; r < MR; r += 2) {
      vf gradient[2][2];
      for (int u = 0; u < 2; ++u)
        for (int h = 0; h < 2; ++h) {
          const int64_t row = p.r0 + i + r + u;
          vf x = t.x[r + u][h] + splat(bias), z = splat(-1.0f);
          if (diagonal) {
            const int64_t d = row - (p.c0 + j * NR + h * VW);
            if (d >= 0 && d < VW && row < positives) z[d] = 1.0f;
          }
          x = x * -z;  // the loss is softplus(x), the derivative -z sigmoid(x)
          const vf magnitude = as_float(as_int(x) & 0x7fffffff);
          const vf e = exp2(magnitude * splat(static_cast<float>(-LOG2E)));
          const vf numerator = x >= 0.0f ? splat(1.0f) : e;
          const vf derivative = -z * (numerator / (splat(1.0f) + e));
          loss_row += max(zero(), x) + log1p_unit(e);
          grad_row += derivative;
          gradient[u][h] = derivative * splat(scale);
        }
      if (g.by_row) g.put(p, i + r, j, gradient[0][0], gradient[0][1], gradient[1][0], gradient[1][1]);
    }
  }
  FFCL_INLINE void end_columns(const Panel&, int64_t) {
    for (int l = 0; l < VW; ++l) loss += loss_row[l], grad += grad_row[l];
  }
  void end(const Panel&) {
    loss_out[rt * chunks + ct] = loss;
    bias_out[rt * chunks + ct] = grad;
  }
};
