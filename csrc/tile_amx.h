// A tile of 32 x 32 accumulators in the processor's tile registers (AMX), and the packed operands it reads. Included by
// tile.h inside its namespace.
//
// A tile register is 16 rows of 64 bytes. Four hold the accumulators, two a left and two a right operand: four loads of
// 1 KB for four products of 16 x 32 x 16, so that the multiplier (a product every 16 cycles) and the loads from L1 (two
// lines a cycle) are busy the whole and half of the time. Layouts, in words of two bfloat16: the left operand in groups
// of MR rows, [word / 16][MR][16], the right one in groups of NR, [word][NR].
//
// Without the instructions (FFCL_WIDTH, for tests) the same in software.

#ifdef __AMX_BF16__
typedef struct {
} Tile;

// The thread's tile registers are given their shapes, and what it had before (another library's) when this goes.
struct TileScope {
  struct alignas(64) Config {
    uint8_t palette = 0, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } before;
  TileScope() {
    Config ours;
    ours.palette = 1;
    for (int i = 0; i < 8; ++i) ours.bytes[i] = 64, ours.rows[i] = 16;
    asm volatile("sttilecfg %0" : "=m"(before));
    use(ours);
  }
  ~TileScope() {
    if (before.palette)
      use(before);
    else
      _tile_release();
  }
  // Not _tile_loadconfig: GCC before 14 takes it to read eight bytes, and drops the stores to the others.
  static FFCL_INLINE void use(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// The compiler does not see what the loads below read.
FFCL_INLINE void keep_order() { asm volatile("" ::: "memory"); }

FFCL_INLINE void clear(Tile&) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
FFCL_INLINE void load_tile(Tile&, const float* p, int64_t stride) {
  keep_order();
  _tile_loadd(0, p, stride * 4);
  _tile_loadd(1, p + 16, stride * 4);
  _tile_loadd(2, p + 16 * stride, stride * 4);
  _tile_loadd(3, p + 16 * stride + 16, stride * 4);
  keep_order();
}
FFCL_INLINE void store_tile(const Tile&, float* p, int64_t stride) {
  _tile_stored(0, p, stride * 4);
  _tile_stored(1, p + 16, stride * 4);
  _tile_stored(2, p + 16 * stride, stride * 4);
  _tile_stored(3, p + 16 * stride + 16, stride * 4);
  keep_order();
}
// c += A B over `steps` steps; the left operand of one lies `a_next` words after that of the one before.
FFCL_INLINE void multiply(Tile&, const Word* a, int64_t a_next, const Word* b, int64_t steps) {
  keep_order();
  for (int64_t s = 0; s < steps; ++s, a += a_next, b += STEP * NR) {
    _tile_loadd(4, a, STEP * 4);
    _tile_loadd(6, b, NR * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 16, NR * 4);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * STEP, STEP * 4);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  keep_order();
}
#else
struct Tile {
  float x[MR][NR];
};
struct TileScope {
  TileScope() {}
};
FFCL_INLINE void clear(Tile& c) { memset(&c, 0, sizeof c); }
FFCL_INLINE void load_tile(Tile& c, const float* p, int64_t stride) {
  for (int r = 0; r < MR; ++r) memcpy(c.x[r], p + r * stride, sizeof c.x[r]);
}
FFCL_INLINE void store_tile(const Tile& c, float* p, int64_t stride) {
  for (int r = 0; r < MR; ++r) memcpy(p + r * stride, c.x[r], sizeof c.x[r]);
}
FFCL_INLINE void multiply(Tile& c, const Word* a, int64_t a_next, const Word* b, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s, a += a_next, b += STEP * NR)
    for (int r = 0; r < MR; ++r)
      for (int h = 0; h < NR; h += VW) {
        vf sum = load(c.x[r] + h);
        for (int d = 0; d < STEP; ++d) {
          vi right;
          memcpy(&right, b + d * NR + h, sizeof right);
          sum = dot_pairs(sum, vi{} + a[r * STEP + d], right);
        }
        store(c.x[r] + h, sum);
      }
}
#endif

FFCL_INLINE void add_tile(Tile& c, float* p, int64_t stride) {
  alignas(64) float x[MR * NR];
  store_tile(c, x, NR);
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r)
    for (int h = 0; h < 2; ++h)
      store(p + r * stride + h * VW, load(p + r * stride + h * VW) + load(x + r * NR + h * VW));
}
// One of several partial sums of a tile; `before` holds the sum of those before it, or is null.
FFCL_INLINE void begin_part(Tile& c, const float* before, int64_t stride) {
  before ? load_tile(c, before, stride) : clear(c);
}
FFCL_INLINE void end_part(Tile&, const float*, int64_t) {}
FFCL_INLINE Values values(const Tile& c) {
  Values v;
  store_tile(c, reinterpret_cast<float*>(&v), NR);
  return v;
}

FFCL_INLINE void multiply_packed(Tile& c, const Word* a, const Word* b, int64_t depth) {
  multiply(c, a, MR * STEP, b, depth / STEP);
}
template <int64_t width>
FFCL_INLINE void multiply_tiles(Tile& c, const Word* a, int64_t a_next, const Word* b, int64_t tiles) {
  static_assert(width == STEP, "a tile of G is one step");
  multiply(c, a, a_next, b, tiles);
}

// The left operand of the scores: rows `first` to first + MR, those from `end` on zero.
template <class T>
void pack_left(const Source<T>& x, int64_t first, int64_t end, Word* out) {
  for (int64_t d = 0; d < x.dim; d += STEP * PER_WORD, out += MR * STEP) {
    const int64_t n = smaller(STEP * PER_WORD, x.dim - d);
    for (int64_t w = 0; w < MR; ++w) {
      const int64_t words = first + w < end ? words_of(n) : 0;
      if (words) read_along(x, first + w, d, n, out + w * STEP);
      for (int64_t l = words; l < STEP; ++l) out[w * STEP + l] = 0;
    }
  }
}
// The left operand of dk^T: the same rows as the dimension summed over; groups of MR dims lie `panel` words apart.
template <class T>
void pack_left_transposed(const Source<T>& x, int64_t first, int64_t end, int64_t panel, Word* out) {
  for (int64_t d = 0; d < x.dim; d += MR, out += panel)
    for (int64_t w = 0; w < STEP; ++w) {
      const int64_t i = first + PER_WORD * w, valid = i < end ? smaller(MR, x.dim - d) : 0;
      Word across[MR] = {};
      if (valid > 0) read_across(x, i, i + 1, end, d, valid, across);
      for (int64_t l = 0; l < MR; ++l) out[l * STEP + w] = across[l];
    }
}
