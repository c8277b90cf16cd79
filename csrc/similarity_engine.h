// The panels of S and the three steps of each: packing, scores, products. Included by similarity_cpu.cpp, which begins
// with how they go together, inside its anonymous namespace, so every instruction set has its own copy.

struct Panel {
  int64_t r0, rows, rows_padded;  // rows [r0, r0 + rows) of S; padded to whole tiles
  int64_t c0, cols;  // columns [c0, c0 + cols)
  int64_t tiles;  // column tiles: cols / NR rounded up
  int64_t first_tile;  // where they start in the packed columns
  int64_t first_both;  // for k = q: tiles before this are on the diagonal block, whose mirror image is itself
  bool rows_are_new, cols_are_new;  // no earlier panel has added to these rows' (columns') gradient

  int64_t size() const { return tiles * NR * rows_padded; }
  bool crosses_diagonal(int64_t i, int64_t j) const {
    const int64_t row = r0 + i, col = c0 + j * NR;
    return row < col + NR && col < row + MR;
  }
};

// A panel of G as the two gradient products read it. In float32 they share one copy, [tile][row][NR]. In pairs each has
// its own, rounded to bfloat16, because each sums over the other dimension:
//   by_column  A of dq    [tile][row][VW]      columns c and c + VW of the tile
//   by_row     B of dk^T  [tile][row / 2][NR]  rows 2 i and 2 i + 1
// and is multiplied by the units of the rows it meets, which were packed without.
struct Gradients {
  Word *by_column, *by_row;
  const float *row_unit, *col_unit;
  // Rows i (even) and i + 1 of column tile j: columns c and c + VW of each.
  FFCL_INLINE void put(const Panel& p, int64_t i, int64_t j, vf x0, vf x1, vf y0, vf y1) const {
    const int64_t at = j * p.rows_padded + i;
#ifdef FFCL_BF16_PAIRS
    if (!row_unit) {
      store_words(by_column + at * VW, to_pairs(x0, x1)), store_words(by_column + (at + 1) * VW, to_pairs(y0, y1));
      store_words(by_row + at * VW, to_pairs(x0, y0)), store_words(by_row + at * VW + VW, to_pairs(x1, y1));
      return;
    }
    const vf u = splat(row_unit[p.r0 + i]), v = splat(row_unit[p.r0 + i + 1]);
    const vf c0 = load(col_unit + p.c0 + j * NR), c1 = load(col_unit + p.c0 + j * NR + VW);
    store_words(by_column + at * VW, to_pairs(x0 * c0, x1 * c1));
    store_words(by_column + (at + 1) * VW, to_pairs(y0 * c0, y1 * c1));
    store_words(by_row + at * VW, to_pairs(x0 * u, y0 * v));
    store_words(by_row + at * VW + VW, to_pairs(x1 * u, y1 * v));
#else
    store(by_row + at * NR, x0), store(by_row + at * NR + VW, x1);
    store(by_row + (at + 1) * NR, y0), store(by_row + (at + 1) * NR + VW, y1);
#endif
  }
};

class Engine {
 public:
  Engine(const Similarity& args, bool gradients)
      : a(args),
        self(!args.k),
        cols(self ? args.rows : args.cols),
        rb(row_block()),
        cb(smaller(6 * (self ? rb : full_row_block()), self ? round_up(cols, rb) : round_up(cols, ROW_TASK))),
        log2_scale(args.scale * LOG2E),
        threads(args.rows * cols * args.dim < 200000 ? 1 : args.threads),
        tile_chunk(smaller((rb > ROW_TASK ? 256 : 64) / NR, share(rb / ROW_TASK * (cb / NR), 8))),
        dim_mr(round_up(args.dim, MR)),
        dim_nr(round_up(args.dim, NR)),
        dim_words(padded_words(args.dim)),
        q_dims(rb * dim_words),
        k_dims(cb * dim_words),
        q_rows(gradients ? dim_mr * words_of(rb) : 0),
        k_rows(gradients ? dim_nr * words_of(cb) : 0),
        g(gradients ? rb * cb : 0),
        dkt(gradients ? dim_mr * cb : 0),
        row_unit(has_units() ? args.rows + ROW_TASK : 0),
        col_unit(has_units() && !self ? cols + ROW_TASK : 0),
        row_ids(by_id() ? args.rows + ROW_TASK : 0),
        col_ids(by_id() ? cols + ROW_TASK : 0) {
    units(a.q_norm, a.rows, row_unit);
    units(a.k_norm, cols, col_unit);
    if (!by_id() || row_ids.failed || col_ids.failed) return;
    narrow_ids(a.row_ids, a.rows, row_ids);
    narrow_ids(self ? a.row_ids : a.col_ids, cols, col_ids);
  }

  bool failed() const {
    return row_ids.failed || col_ids.failed || q_dims.failed || k_dims.failed || q_rows.failed || k_rows.failed ||
           g.failed || dkt.failed || row_unit.failed || col_unit.failed;
  }

  const Similarity& a;
  const bool self;
  const int64_t cols;
  const int64_t rb, cb;  // rows and columns of a full panel
  const double log2_scale;  // S in units of log2, for exp2
  const int threads;
  const int64_t tile_chunk;  // column tiles in a scores task
  const int64_t dim_mr, dim_nr, dim_words;
  // For AMX the layouts of A are others (tile_amx.h). In words, which are pairs along the dimension named in words: of
  // rows 2 i and 2 i + 1 in q_rows, and of columns c and c + VW of a tile in k_rows, as in the two copies of G.
  Buffer<Word> q_dims;  // [rb / MR][dim words][MR]    A of the scores
  Buffer<Word> k_dims;  // [cb / NR][dim words][NR]    B of the scores
  Buffer<Word> q_rows;  // [dim / MR][row words][MR]   A of dk^T
  Buffer<Word> k_rows;  // [dim / NR][cb words][NR]    B of dq
  Buffer<Word> g;  // Gradients                   B of dk^T and, by broadcasts, A of dq
  Buffer<float> dkt;  // [dim][cb]                   dk^T of the current columns
  Buffer<float> row_unit, col_unit;  // null: of rows that are not divided, or in float32
  Buffer<int32_t> row_ids, col_ids;  // the low halves of the ids, to compare many at once
  bool ids_exact = true;  // they are the whole ids

  // `scores` false: no panel's scores are computed, so that the columns are not packed for them.
  template <class Body, class End>
  void for_each_panel(bool scores, Body&& body, End&& columns_done) {
    for (int64_t c0 = 0; c0 < cols; c0 += cb) {
      const int64_t c1 = smaller(cols, c0 + cb);
      pack_columns(c0, c1, scores);
      for (int64_t r0 = 0; r0 < rows_to(c1); r0 += rb) body(panel(r0, c0, c1));
      columns_done(c0, c1);
    }
  }

  // Floats of exp(S) in all panels, padded to whole tiles.
  int64_t kept_size() const {
    int64_t size = 0;
    for (int64_t c0 = 0; c0 < cols; c0 += cb)
      for (int64_t r0 = 0, c1 = smaller(cols, c0 + cb); r0 < rows_to(c1); r0 += rb) size += panel(r0, c0, c1).size();
    return size;
  }

  // Rows of a panel into q_dims for the scores, or q_rows for the gradient, or both.
  void pack_rows(const Panel& p, bool scores, bool gradients) {
    const int64_t end = p.r0 + p.rows;
    by_type(a.queries(), [&](auto q, auto) {
      parallel(p.rows_padded / MR, threads, [&](int64_t group, int) {
        const int64_t i = group * MR;
        if (scores) pack_left(q, p.r0 + i, end, q_dims + i * dim_words);
        if (gradients)
          pack_left_transposed(q, p.r0 + i, end, p.rows_padded / PER_WORD * MR, q_rows + i / PER_WORD * MR);
      });
    });
  }

  // Largest norm of a row; `finite` turns false where one is not finite. Divided rows are no longer than 1.
  double largest_norm(const Rows& x, bool& finite) const {
    if (x.norm) {
      for (int64_t i = 0; i < x.rows; ++i) finite = finite && x.norm[i] < __builtin_inff();
      return 1;
    }
    constexpr int64_t step = 32;
    const int64_t tasks = (x.rows + step - 1) / step;
    Buffer<float> part(tasks);
    if (part.failed) return finite = false, 0.0;
    by_type(x, [&](auto source, auto type) {
      using T = decltype(type);
      parallel(tasks, threads, [&](int64_t task, int) {
        float best = 0;
        for (int64_t i = task * step; i < smaller(x.rows, (task + 1) * step); ++i) {
          const auto* row = source.row(i);
          vf s0 = zero(), s1 = zero();
          int64_t d = 0;
          for (; d + 2 * VW <= a.dim; d += 2 * VW) {
            const vf x0 = T::load_vector(row + d), x1 = T::load_vector(row + d + VW);
            s0 += x0 * x0;
            s1 += x1 * x1;
          }
          float s = sum(s0 + s1);
          for (; d < a.dim; ++d) s += T::get(row + d) * T::get(row + d);
          best = s <= best ? best : s;  // NaN goes in ...
          if (!(s < __builtin_inff())) break;  // ... and stays
        }
        part[task] = best;
      });
    });
    double best = 0;
    for (int64_t i = 0; i < tasks; ++i) {
      finite = finite && part[i] < __builtin_inff();
      best = part[i] > best ? part[i] : best;
    }
    return std::sqrt(best);
  }

  // Upper bound of |S| log2(e), infinite where an input is not finite.
  double bound() const {
    bool finite = true;
    const double q = largest_norm(a.queries(), finite);
    const double k = self ? q : largest_norm(a.keys(), finite);
    const double b = std::fabs(static_cast<double>(a.scale)) * LOG2E * q * k * 1.0001;
    return finite && b < 1e30 ? b : static_cast<double>(__builtin_inf());
  }

  // Register tiles of `scale` q k^T for one panel, each handed to a copy of `epilogue` that its task owns.
  template <class Epilogue>
  void scores(const Panel& p, double scale, const Epilogue& epilogue) {
    const vf factor = splat(static_cast<float>(scale));  // after the sum: it costs the products no bits
    const int64_t col_tasks = (p.tiles + tile_chunk - 1) / tile_chunk;
    const int64_t row_tasks = (p.rows_padded + ROW_TASK - 1) / ROW_TASK;
    // Parts of 128 words, so that their operands (8 KB of B in AVX2's tiles) stay in L1.
    constexpr int64_t depth = 128, ahead = depth * NR * MR / ROW_TASK;  // words of the next step of B for each tile
    parallel(row_tasks * col_tasks, threads, [&](int64_t task, int) {
      alignas(64) float partial[ROW_TASK * NR];
      const int64_t rt = task / col_tasks, ct = task % col_tasks;
      const int64_t first = rt * ROW_TASK, last = smaller(p.rows_padded, first + ROW_TASK);
      const TileScope scope;
      Epilogue e(epilogue);
      e.begin(p, rt, ct);
      for (int64_t j = ct * tile_chunk; j < smaller(p.tiles, (ct + 1) * tile_chunk); ++j) {
        e.begin_columns();
        const Word* b = k_dims + (p.first_tile + j) * NR * dim_words;
        for (int64_t d = 0; d < dim_words; d += depth) {
          const bool complete = d + depth >= dim_words;
          for (int64_t i = first; i < last; i += MR) {
            Tile t;
            float* part = partial + (i - first) * NR;
            begin_part(t, d > 0 ? part : nullptr, NR);
            prefetch(b + (d + depth) * NR + (i - first) / MR * ahead, ahead * 4);
            multiply_packed(t, q_dims + i * dim_words + d * MR, b + d * NR, complete ? dim_words - d : depth);
            end_part(t, d > 0 ? part : nullptr, NR);
            if (!complete) {
              store_tile(t, part, NR);
              continue;
            }
            auto&& s = values(t);
            if (row_unit.data)
              scale_values(s, factor, row_unit + p.r0 + i, units_of_columns() + p.c0 + j * NR);
            else
              scale_values(s, factor);
            if (touches_mask(p, i, j)) mask(p, i, j, s);
            e.tile(p, i, j, s);
          }
        }
        e.end_columns(p, j);
      }
      e.end(p);
    });
  }

  Gradients gradients() const {
    return {g, PER_WORD == 1 ? g.data : g + rb * cb / PER_WORD, row_unit, units_of_columns()};
  }

  // G of a panel whose exponentials the forward pass kept.
  void rescale(const Panel& p, const float* kept, const float* row, const float* col) {
    parallel(p.tiles, threads, [&](int64_t j, int) {
      const float* from = kept + j * p.rows_padded * NR;
      const Gradients to = gradients();
      const vf b0 = load(col + p.c0 + j * NR), b1 = load(col + p.c0 + j * NR + VW);
      for (int64_t i = 0; i < p.rows_padded; i += 2, from += 2 * NR) {
        const vf x = splat(row[p.r0 + i]), y = splat(row[p.r0 + i + 1]);
        to.put(p, i, j, load(from) * (x + b0), load(from + VW) * (x + b1), load(from + NR) * (y + b0),
               load(from + NR + VW) * (y + b1));
      }
    });
  }

  // dq[rows] += G k and dk^T[columns] += q^T G for the panel in `g`.
  void products(const Panel& p, float* dq, bool need_k) {
    const int64_t row_tasks = dq ? (p.rows_padded + ROW_TASK - 1) / ROW_TASK : 0;
    const int64_t first_both = self ? p.first_both : 0;
    const int64_t both = need_k ? p.tiles - first_both : 0;
    const int64_t chunk = smaller(128 / NR, share(both, 4));
    const int64_t col_tasks = (both + chunk - 1) / chunk;
    // Dimensions of dq in a task. All of them where there are rows enough for every thread: each slice reads G anew.
    const int64_t slice = larger(128, round_up(share(a.dim, 6 / (rb / ROW_TASK)), NR));
    const int64_t slices = (a.dim + slice - 1) / slice;
    parallel(row_tasks * slices + col_tasks, threads, [&](int64_t task, int) {
      const int64_t col_task = task - row_tasks * slices;
      const TileScope scope;
      if (col_task < 0)
        row_product(p, task / slices * ROW_TASK, task % slices * slice, smaller(a.dim, (task % slices + 1) * slice),
                    dq);
      else
        column_product(p, first_both + col_task * chunk, smaller(p.tiles, first_both + (col_task + 1) * chunk));
    });
  }

  // dk of columns [c0, c1): transposed out of dkt. For k = q it is added: dq has the other half of each column, and
  // all of those of the first panel, which lie on the diagonal block.
  void flush_columns(int64_t c0, int64_t c1, float* dk) {
    const int64_t begin = self && c0 == 0 ? smaller(rb, c1) : c0;
    parallel((c1 - begin + VW - 1) / VW, threads, [&](int64_t task, int) {
      const int64_t j = begin + task * VW, columns = smaller(VW, c1 - j);
      for (int64_t d = 0; d < a.dim; d += VW) {
        const int64_t dims = smaller(VW, a.dim - d);
        vf x[VW];
        for (int64_t l = 0; l < VW; ++l) x[l] = l < dims ? load(dkt + (d + l) * cb + j - c0) : zero();
        transpose(x);
        for (int64_t l = 0; l < columns; ++l) {
          float* to = dk + (j + l) * a.dim + d;
          if (dims == VW)
            store(to, self ? load(to) + x[l] : x[l]);
          else
            for (int64_t m = 0; m < dims; ++m) to[m] = self ? to[m] + x[l][m] : x[l][m];
        }
      }
    });
  }

 private:
  // What a task takes of `work` for there to be `tasks`. By size, not by the number of threads: sums must not depend on
  // it.
  static int64_t share(int64_t work, int64_t tasks) { return larger(1, work / tasks); }

  const float* units_of_columns() const { return self ? row_unit : col_unit; }

  bool has_units() const { return PER_WORD == 2 && (a.q_norm || a.k_norm); }
  static void units(const float* norm, int64_t n, float* out) {
    if (!out) return;
    for (int64_t i = 0; i < n; ++i) out[i] = norm ? unit(norm[i]) : 1;
    for (int64_t i = n; i < n + ROW_TASK; ++i) out[i] = 1;
  }

  int64_t full_row_block() const { return a.dim <= 512 ? 384 : a.dim <= 1024 ? 192 : ROW_TASK; }
  int64_t row_block() const {
    // Half of each block on the diagonal is computed for nothing, so k = q has eight blocks a side at least.
    return smaller(full_row_block(), larger(ROW_TASK, round_up(self ? a.rows / 8 : a.rows, ROW_TASK)));
  }

  int64_t rows_to(int64_t c1) const { return self ? c1 : a.rows; }

  Panel panel(int64_t r0, int64_t c0, int64_t c1) const {
    Panel p;
    p.r0 = r0;
    p.rows = smaller(rb, a.rows - r0);
    p.rows_padded = round_up(p.rows, MR);
    p.c0 = self ? larger(c0, r0) : c0;
    p.cols = c1 - p.c0;
    p.tiles = (p.cols + NR - 1) / NR;
    p.first_tile = (p.c0 - c0) / NR;
    p.first_both = self && r0 >= c0 ? smaller(p.tiles, rb / NR) : 0;
    p.rows_are_new = self ? r0 >= c0 : c0 == 0;
    p.cols_are_new = r0 == 0;
    return p;
  }

  void pack_columns(int64_t c0, int64_t c1, bool scores) {
    by_type(a.keys(), [&](auto k, auto) {
      parallel((c1 - c0 + NR - 1) / NR, threads, [&](int64_t group, int) {
        const int64_t j = group * NR;
        if (scores) pack_group_by_dim<NR>(k, c0 + j, c1, k_dims + j * dim_words);
        for (int64_t w = 0; k_rows.data && w < NR / PER_WORD; ++w)
          pack_row_by_panel<NR>(k, c0 + j + w, c0 + j + w + VW, c1, cb / PER_WORD * NR,
                                k_rows + (j / PER_WORD + w) * NR);
      });
    });
  }

  // dq rows [first, first + ROW_TASK) of the panel, dimensions [d0, d1). G's tiles are read by broadcast, 64 bytes of a
  // row at a time.
  void row_product(const Panel& p, int64_t first, int64_t d0, int64_t d1, float* dq) {
    constexpr int64_t depth = 256 * PER_WORD, tile_words = NR / PER_WORD, ahead = depth / PER_WORD * NR * MR / ROW_TASK;
    const int64_t last = smaller(p.rows_padded, first + ROW_TASK), tiles_a_step = depth / NR;
    for (int64_t j0 = 0; j0 < p.tiles; j0 += tiles_a_step)
      for (int64_t d = d0; d < d1; d += NR)
        for (int64_t i = first; i < last; i += MR) {
          Tile t;
          clear(t);
          const Word* b = k_rows + d * cb / PER_WORD + (p.first_tile + j0) * tile_words * NR;
          prefetch(b + NR * cb / PER_WORD + (i - first) / MR * ahead, ahead * 4);
          if (i + MR <= p.rows && d + NR <= a.dim) prefetch_tile(dq + (p.r0 + i) * a.dim + d, a.dim);
          multiply_tiles<tile_words>(t, gradients().by_column + (j0 * p.rows_padded + i) * tile_words,
                                     p.rows_padded * tile_words, b, smaller(tiles_a_step, p.tiles - j0));
          add_rows(t, dq + (p.r0 + i) * a.dim + d, p.rows - i, a.dim - d, p.rows_are_new && j0 == 0);
        }
  }

  void add_rows(Tile& t, float* to, int64_t rows, int64_t dims, bool first) {
    if (rows >= MR && dims >= NR) return first ? store_tile(t, to, a.dim) : add_tile(t, to, a.dim);
    alignas(64) float x[MR * NR];
    store_tile(t, x, NR);
    for (int64_t r = 0; r < smaller(rows, MR); ++r)
      for (int64_t d = 0; d < smaller(dims, NR); ++d)
        to[r * a.dim + d] = first ? x[r * NR + d] : to[r * a.dim + d] + x[r * NR + d];
  }

  // dk^T of column tiles [j0, j1), 192 dimensions at a time so that q_rows' part stays in L2.
  void column_product(const Panel& p, int64_t j0, int64_t j1) {
    constexpr int64_t depth = 256 * PER_WORD, dims = 192, ahead = depth / PER_WORD * NR * MR / dims;
    for (int64_t d0 = 0; d0 < dim_mr; d0 += dims)
      for (int64_t j = j0; j < j1; ++j)
        for (int64_t i = 0; i < p.rows_padded; i += depth)
          for (int64_t d = d0; d < smaller(dim_mr, d0 + dims); d += MR) {
            float* c = dkt + d * cb + (p.first_tile + j) * NR;
            const float* before = p.cols_are_new && i == 0 ? nullptr : c;
            Tile t;
            begin_part(t, before, cb);
            prefetch_tile(c + MR * cb, cb);
            prefetch(gradients().by_row + (j * p.rows_padded + i + depth) / PER_WORD * NR + (d - d0) / MR * ahead,
                     ahead * 4);
            multiply_packed(t, q_rows + (d * p.rows_padded + i * MR) / PER_WORD,
                            gradients().by_row + (j * p.rows_padded + i) / PER_WORD * NR,
                            smaller(depth, p.rows_padded - i) / PER_WORD);
            end_part(t, before, cb);
            store_tile(t, c, cb);
          }
  }

  bool by_id() const { return a.exclude != Exclude::none && a.exclude != Exclude::diagonal; }

  void narrow_ids(const int64_t* ids, int64_t n, int32_t* out) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<int32_t>(ids[i]);
      ids_exact = ids_exact && out[i] == ids[i];
    }
    for (int64_t i = n; i < n + ROW_TASK; ++i) out[i] = 0;
  }

  bool touches_mask(const Panel& p, int64_t i, int64_t j) const {
    if (i + MR > p.rows || (j + 1) * NR > p.cols) return true;
    if (a.exclude == Exclude::none) return false;
    if (a.exclude == Exclude::diagonal) return p.crosses_diagonal(i, j);
    if (a.exclude == Exclude::different_id) return true;
    const int32_t* col = col_ids + p.c0 + j * NR;
    const vi c0 = load_int(col), c1 = load_int(col + VW);
    vi equal = vi{};
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const vi row = vi{} + row_ids[p.r0 + i + r];
      equal |= (c0 == row) | (c1 == row);
    }
    return any(equal);
  }

  // -inf at the pairs left out and beyond the edges.
  void mask(const Panel& p, int64_t i0, int64_t j0, Values& t) const {
    const bool inside = i0 + MR <= p.rows && (j0 + 1) * NR <= p.cols;
    const bool vectors =
        by_id() && ids_exact && !(a.exclude == Exclude::same_id_off_diagonal && p.crosses_diagonal(i0, j0));
    if (!inside || !vectors) return mask_by_element(p, i0, j0, t);
    const vf out = splat(-__builtin_inff());
    const int32_t* col = col_ids + p.c0 + j0 * NR;
    for (int r = 0; r < MR; ++r)
      for (int h = 0; h < 2; ++h) {
        const vi equal = load_int(col + h * VW) == vi{} + row_ids[p.r0 + i0 + r];
        t.x[r][h] = (a.exclude == Exclude::different_id ? ~equal : equal) ? out : t.x[r][h];
      }
  }

  void mask_by_element(const Panel& p, int64_t i0, int64_t j0, Values& t) const {
    alignas(64) float x[MR * NR];
    store_values(t, x);
    const int64_t* ids = self ? a.row_ids : a.col_ids;
    for (int64_t r = 0; r < MR; ++r)
      for (int64_t c = 0; c < NR; ++c) {
        const int64_t i = p.r0 + i0 + r, j = p.c0 + j0 * NR + c;
        bool out = i0 + r >= p.rows || j0 * NR + c >= p.cols;
        if (!out && a.exclude == Exclude::diagonal) out = i == j;
        if (!out && a.exclude == Exclude::same_id) out = a.row_ids[i] == ids[j];
        if (!out && a.exclude == Exclude::same_id_off_diagonal) out = i != j && a.row_ids[i] == ids[j];
        if (!out && a.exclude == Exclude::different_id) out = a.row_ids[i] != ids[j];
        if (out) x[r * NR + c] = -__builtin_inff();
      }
    load_values(t, x);
  }
};
