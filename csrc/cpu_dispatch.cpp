// Chooses among the instruction sets the CPU kernels were compiled for. Compiled with baseline flags only.
//
// A kernel is added here by its name in FFCL_DECLARE and one function at the end that forwards to it.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef FFCL_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "goodness.h"
#include "isa.h"
#include "rows.h"
#include "similarity.h"
#include "valid.h"

namespace ffcl {
namespace {

#ifdef FFCL_AMX
// Linux lets a process use the tile registers once it has asked to.
bool have_amx() {
  unsigned a, b, c, d;
  constexpr unsigned tile = 1u << 24, bf16 = 1u << 22;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tile) && (d & bf16) &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

// avx2 stands for what every AVX2 processor has beside it (FMA, F16C, BMI2); avx512 for the Skylake server set.
bool supported(Isa isa) {
#ifdef FFCL_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef FFCL_AVX512_BF16
  if (isa == Isa::avx512_bf16) return supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef FFCL_AMX
  if (isa == Isa::amx) return supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16") && have_amx();
#endif
  return isa == Isa::portable || isa == Isa::portable_bf16 || isa == Isa::portable_amx;
}

// On AMD's processors an instruction on pairs of bfloat16 takes as long as one on float32, so half the time for a
// product; on the Intel server that has run this set twice as long, so that nothing is won.
bool pairs_pay() {
#ifdef FFCL_X86
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Isa best() {
  for (Isa isa : {Isa::amx, Isa::avx512_bf16, Isa::avx512, Isa::avx2})
    if (supported(isa) && (isa != Isa::avx512_bf16 || pairs_pay())) return isa;
  return Isa::portable;
}

Isa choose() {
  const char* wanted = std::getenv("FFCL_ISA");
  if (!wanted || !*wanted) return best();
  for (Isa isa :
       {Isa::portable, Isa::avx2, Isa::avx512, Isa::portable_bf16, Isa::avx512_bf16, Isa::portable_amx, Isa::amx}) {
    if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
    if (supported(isa)) return isa;
    throw std::runtime_error(std::string("FFCL_ISA=") + wanted + ": this processor has " + isa_name(best()) +
                             " at best");
  }
  throw std::invalid_argument(
      std::string("FFCL_ISA must be portable, avx2, avx512, portable_bf16, avx512_bf16, portable_amx or amx; got '") +
      wanted + "'");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::portable_bf16: return "portable_bf16";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::portable_amx: return "portable_amx";
    case Isa::amx: return "amx";
    default: return "portable";
  }
}

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

// Each kernel exists once in the namespace of every instruction set, with the type of its declaration in ffcl.
#define FFCL_DECLARE_SIMILARITY(isa)                       \
  namespace isa {                                          \
  decltype(ffcl::similarity_forward) similarity_forward;   \
  decltype(ffcl::similarity_backward) similarity_backward; \
  decltype(ffcl::siglip) siglip;                           \
  }
#define FFCL_DECLARE(isa)                                        \
  FFCL_DECLARE_SIMILARITY(isa)                                   \
  namespace isa {                                                \
  decltype(ffcl::goodness_forward) goodness_forward;             \
  decltype(ffcl::goodness_backward) goodness_backward;           \
  decltype(ffcl::pair_cosine_forward) pair_cosine_forward;       \
  decltype(ffcl::pair_cosine_backward) pair_cosine_backward;     \
  decltype(ffcl::pool_goodness_forward) pool_goodness_forward;   \
  decltype(ffcl::pool_goodness_backward) pool_goodness_backward; \
  decltype(ffcl::row_norms) row_norms;                           \
  decltype(ffcl::row_dots) row_dots;                             \
  decltype(ffcl::add_weighted_rows) add_weighted_rows;           \
  decltype(ffcl::class_dots) class_dots;                         \
  decltype(ffcl::add_class_gradient) add_class_gradient;         \
  decltype(ffcl::finish_gradient) finish_gradient;               \
  }
FFCL_DECLARE(portable)
FFCL_DECLARE_SIMILARITY(portable_bf16)
FFCL_DECLARE_SIMILARITY(portable_amx)
#ifdef FFCL_X86
FFCL_DECLARE(avx2)
FFCL_DECLARE(avx512)
#define FFCL_DISPATCH(call)                \
  switch (current_isa()) {                 \
    case Isa::amx:                         \
    case Isa::avx512_bf16:                 \
    case Isa::avx512: return avx512::call; \
    case Isa::avx2: return avx2::call;     \
    default: return portable::call;        \
  }
#else
#define FFCL_DISPATCH(call) return portable::call;
#endif

// The same, with bfloat16 rows in pairs where the set asks for it.
#ifdef FFCL_AVX512_BF16
FFCL_DECLARE_SIMILARITY(avx512_bf16)
#define FFCL_CASE_AVX512_BF16(call) \
  case Isa::avx512_bf16: return avx512_bf16::call;
#else
#define FFCL_CASE_AVX512_BF16(call)
#endif
#ifdef FFCL_AMX
FFCL_DECLARE_SIMILARITY(amx)
#define FFCL_CASE_AMX(call) \
  case Isa::amx: return amx::call;
#else
#define FFCL_CASE_AMX(call)
#endif
#define FFCL_DISPATCH_SIMILARITY(call)                     \
  if (args.dtype == DType::bfloat16) {                     \
    switch (current_isa()) {                               \
      case Isa::portable_bf16: return portable_bf16::call; \
      case Isa::portable_amx:                              \
        return portable_amx::call;                         \
        FFCL_CASE_AVX512_BF16(call)                        \
        FFCL_CASE_AMX(call)                                \
      default: break;                                      \
    }                                                      \
  }                                                        \
  FFCL_DISPATCH(call)

int similarity_forward(const Similarity& args, float* row_lse, float* col_lse, float* cache, int64_t cache_size) {
  if (!valid(args) || !row_lse || !valid_cache(args, cache, cache_size)) return bad_argument;
  FFCL_DISPATCH_SIMILARITY(similarity_forward(args, row_lse, col_lse, cache, cache_size))
}

int similarity_backward(const Similarity& args, const float* row_lse, const float* col_lse, const float* row_grad,
                        const float* col_grad, const float* cache, int64_t cache_size, float* dq, float* dk) {
  if (!valid(args) || !row_lse || !row_grad || (args.k && col_grad && !col_lse) || (!args.k && !dq) ||
      !valid_cache(args, cache, cache_size))
    return bad_argument;
  FFCL_DISPATCH_SIMILARITY(similarity_backward(args, row_lse, col_lse, row_grad, col_grad, cache, cache_size, dq, dk))
}

int siglip(const Similarity& args, float bias, bool positives, float* loss, float* dbias, float* dq, float* dk) {
  if (!valid(args) || !args.k || !loss || !dbias) return bad_argument;
  FFCL_DISPATCH_SIMILARITY(siglip(args, bias, positives, loss, dbias, dq, dk))
}

int goodness_forward(const Activations& h, bool mean, double eps, float* goodness, void* out) {
  if (!valid(h)) return bad_argument;
  FFCL_DISPATCH(goodness_forward(h, mean, eps, goodness, out))
}

int goodness_backward(const Activations& h, bool mean, double eps, const float* goodness, const float* grad_goodness,
                      const void* grad_out, void* dh) {
  if (!valid(h)) return bad_argument;
  FFCL_DISPATCH(goodness_backward(h, mean, eps, goodness, grad_goodness, grad_out, dh))
}

int pair_cosine_forward(const Activations& h1, const void* h2, int64_t h2_stride, const float* target, double margin,
                        double scale, float* loss, float* coefficients, void* d1, void* d2) {
  if (!valid(h1) || !valid_rows(h2, h1.rows, h1.dim, h2_stride)) return bad_argument;
  FFCL_DISPATCH(pair_cosine_forward(h1, h2, h2_stride, target, margin, scale, loss, coefficients, d1, d2))
}

int pair_cosine_backward(const Activations& h1, const void* h2, int64_t h2_stride, const float* coefficients,
                         const float* grad, void* d1, void* d2) {
  if (!valid(h1) || !valid_rows(h2, h1.rows, h1.dim, h2_stride)) return bad_argument;
  FFCL_DISPATCH(pair_cosine_backward(h1, h2, h2_stride, coefficients, grad, d1, d2))
}

int pool_goodness_forward(const Maps& h, bool mean, float* goodness, float* pooled) {
  if (!valid(h)) return bad_argument;
  FFCL_DISPATCH(pool_goodness_forward(h, mean, goodness, pooled))
}

int pool_goodness_backward(const Maps& h, bool mean, const float* pooled, const float* grad_goodness,
                           const float* grad_pooled, void* dh) {
  if (!valid(h)) return bad_argument;
  FFCL_DISPATCH(pool_goodness_backward(h, mean, pooled, grad_goodness, grad_pooled, dh))
}

int row_norms(const Rows& x, double eps, int threads, float* norm) {
  if (!valid(x) || !norm) return bad_argument;
  FFCL_DISPATCH(row_norms(x, eps, threads, norm))
}

int row_dots(const Rows& a, const Rows& b, int threads, double* dot) {
  if (!valid(a) || !valid(b) || a.dtype != b.dtype || a.dim != b.dim || a.rows > b.rows || !dot) return bad_argument;
  FFCL_DISPATCH(row_dots(a, b, threads, dot))
}

int add_weighted_rows(const Rows& z, const float* weight, int threads, float* grad) {
  if (!valid(z) || !weight || !grad) return bad_argument;
  FFCL_DISPATCH(add_weighted_rows(z, weight, threads, grad))
}

int class_dots(const Rows& z, const int64_t* order, const int64_t* group, int threads, double* dot) {
  if (!valid(z) || !order || !group || !dot) return bad_argument;
  FFCL_DISPATCH(class_dots(z, order, group, threads, dot))
}

int add_class_gradient(const Rows& z, const int64_t* order, const int64_t* group, const float* weight, int threads,
                       float* grad) {
  if (!valid(z) || !order || !group || !weight || !grad) return bad_argument;
  FFCL_DISPATCH(add_class_gradient(z, order, group, weight, threads, grad))
}

int finish_gradient(const Rows& z, double eps, int threads, float* grad, double* inner) {
  if (!valid(z) || !grad || !inner) return bad_argument;
  FFCL_DISPATCH(finish_gradient(z, eps, threads, grad, inner))
}

}  // namespace ffcl
