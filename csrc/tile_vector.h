// A tile of accumulators in vector registers, and the packed operands it reads. Included by tile.h inside its
// namespace.
//
// Layouts, in words: the left operand in groups of MR rows, [word][MR]; the right one in groups of NR, [word][NR].

typedef Values Tile;

// What a thread holds while it multiplies: nothing here.
struct TileScope {
  TileScope() {}
};

FFCL_INLINE void clear(Tile& c) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) c.x[r][0] = c.x[r][1] = zero();
}
FFCL_INLINE void load_tile(Tile& c, const float* p, int64_t stride) { load_values(c, p, stride); }
FFCL_INLINE void store_tile(const Tile& c, float* p, int64_t stride) { store_values(c, p, stride); }
FFCL_INLINE void add_tile(const Tile& c, float* p, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
    for (int h = 0; h < 2; ++h) store(p + r * stride + h * VW, load(p + r * stride + h * VW) + c.x[r][h]);
}

// One of several partial sums of a tile; `before` holds the sum of those before it, or is null. Sums of sums have a
// fraction of the rounding error of one long sum.
FFCL_INLINE void begin_part(Tile& c, const float*, int64_t) { clear(c); }
FFCL_INLINE void end_part(Tile& c, const float* before, int64_t stride) {
  if (!before) return;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) c.x[r][0] += load(before + r * stride), c.x[r][1] += load(before + r * stride + VW);
}
FFCL_INLINE Values& values(Tile& c) { return c; }

FFCL_INLINE vf add_products(vf acc, vf a, vf b) { return acc + a * b; }
FFCL_INLINE vf add_products(vf acc, vi a, vi b) { return dot_pairs(acc, a, b); }
FFCL_INLINE vf splat_word(float x) { return splat(x); }
FFCL_INLINE vi splat_word(int32_t x) { return vi{} + x; }

// c += A B over `depth` words. A: word (r, d) at a[r * a_row + d * a_step]; B: (d, j) at b[d * NR + j].
template <int64_t a_row, int64_t a_step>
FFCL_INLINE void multiply(Tile& c, const Word* a, const Word* b, int64_t depth) {
  for (int64_t d = 0; d < depth; ++d, a += a_step, b += NR) {
    const Words b0 = load_words(b), b1 = load_words(b + VW);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const Words x = splat_word(a[r * a_row]);
      c.x[r][0] = add_products(c.x[r][0], x, b0);
      c.x[r][1] = add_products(c.x[r][1], x, b1);
    }
  }
}
// The same for a left operand as the packing below leaves it, ...
FFCL_INLINE void multiply_packed(Tile& c, const Word* a, const Word* b, int64_t depth) {
  multiply<1, MR>(c, a, b, depth);
}
// ... and over `tiles` tiles of G, rows of `width` words, each `a_next` after the one before.
template <int64_t width>
FFCL_INLINE void multiply_tiles(Tile& c, const Word* a, int64_t a_next, const Word* b, int64_t tiles) {
  for (int64_t j = 0; j < tiles; ++j, a += a_next, b += width * NR) multiply<width, 1>(c, a, b, width);
}

// The left operand of the scores: rows `first` to first + MR, those from `end` on zero.
template <class T>
FFCL_INLINE void pack_left(const Source<T>& x, int64_t first, int64_t end, Word* out) {
  pack_group_by_dim<MR>(x, first, end, out);
}
// The left operand of dk^T: the same rows as the dimension summed over; groups of MR dims lie `panel` words apart.
template <class T>
FFCL_INLINE void pack_left_transposed(const Source<T>& x, int64_t first, int64_t end, int64_t panel, Word* out) {
  for (int64_t i = first; i < first + MR; i += PER_WORD, out += MR) pack_row_by_panel<MR>(x, i, i + 1, end, panel, out);
}
