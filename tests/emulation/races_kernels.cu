// Kernels with a race each, and mended: tests/test_cuda_races.py asks races.cpp for all of the former and none of the
// latter. Blocks of 256 threads, two of them a cluster.
#define FFCL_SM90A 1

#include "races_kernels.h"

#include <cuda.h>

#include <stdexcept>

#include "cuda_launch.cuh"
#include "similarity_plan.h"

namespace ffcl {
namespace {

constexpr int THREADS = 256, BOX = 64 * 128;  // of 64 rows of 64 elements, in bytes

struct Case {
  bool mended;
  CUtensorMap map;  // of the input: 64 rows of 64 elements
  unsigned char *input, *output;
};

// What the kernels have in shared memory: four boxes, numbers, barriers.
struct Memory {
  unsigned char* boxes = shared_memory();
  float* numbers = reinterpret_cast<float*>(boxes + 4 * BOX);
  uint64_t* full = reinterpret_cast<uint64_t*>(numbers + 2 * THREADS);
  uint64_t* empty = full + 1;

  void begin(int consumers) const {
    if (threadIdx.x == 0) {
      barrier_init(full, 1);
      barrier_init(empty, consumers);
      barriers_ready();
    }
    cluster_meet();
  }
  void fill(const Case& c, int box, int parity) const {
    if (threadIdx.x == 0) {
      barrier_expect(full, BOX);
      copy_box(boxes + box * BOX, &c.map, full, 0, 0);
    }
    barrier_wait(full, parity);
  }
  void begin_with_operands(const Case& c) const {
    begin(1);
    for (int box = 0; box < 3; ++box) fill(c, box, box % 2);
  }
};

void store(const Case& c, float x) { reinterpret_cast<float*>(c.output)[blockIdx.x * THREADS + threadIdx.x] = x; }

__global__ void no_barrier_before_a_read(Case c) {
  const Memory m;
  m.numbers[threadIdx.x] = 1.f;
  if (c.mended) __syncthreads();
  store(c, m.numbers[(threadIdx.x + 32) % THREADS]);
}

__global__ void no_barrier_before_the_next_write(Case c) {
  const Memory m;
  float sum = 0.f;
  for (int i = 0; i < 2; ++i) {
    m.numbers[threadIdx.x] = 1.f;
    __syncthreads();
    sum += m.numbers[(threadIdx.x + 32) % THREADS];
    if (c.mended) __syncthreads();
  }
  store(c, sum);
}

__global__ void a_barrier_of_half_the_threads(Case c) {
  const Memory m;
  m.numbers[threadIdx.x] = 1.f;
  meet(c.mended ? 1 : 1 + threadIdx.x / 128, c.mended ? THREADS : 128);
  store(c, m.numbers[(threadIdx.x + 128) % THREADS]);
}

__global__ void nothing_within_a_warp(Case c) {
  const Memory m;
  m.numbers[threadIdx.x] = 1.f;
  if (c.mended) __syncwarp();
  store(c, m.numbers[threadIdx.x ^ 1]);
}

__global__ void a_shuffle_for_a_fence(Case c) {
  const Memory m;
  m.numbers[threadIdx.x] = 1.f;
  const float x = __shfl_xor_sync(0xffffffffu, 1.f, 1);
  if (c.mended) __syncwarp();
  store(c, x + m.numbers[threadIdx.x ^ 1]);
}

__global__ void ldmatrix_without_a_barrier(Case c) {
  const Memory m;
  reinterpret_cast<float*>(m.boxes)[threadIdx.x] = 1.f;
  if (c.mended) __syncthreads();
  uint32_t r[4];
  load_matrices(r, m.boxes + threadIdx.x % 32 * 16);
  store(c, r[0]);
}

__global__ void two_threads_store_the_same_half_word(Case c) {
  const Memory m;
  reinterpret_cast<uint16_t*>(m.numbers)[c.mended ? threadIdx.x : threadIdx.x / 2] = 1;
}

__global__ void copies_that_only_another_warp_waits_for(Case c) {
  const Memory m;
  copy16_async(m.boxes + threadIdx.x * 16, c.input + threadIdx.x * 16, true);
  copies_commit();
  if (c.mended || threadIdx.x >= 32) copies_wait<0>();
  __syncthreads();
  if (threadIdx.x >= 32) store(c, m.boxes[(threadIdx.x - 32) * 16]);
}

__global__ void a_wait_after_the_barrier(Case c) {
  const Memory m;
  copy16_async(m.boxes + threadIdx.x * 16, c.input, true);
  copies_commit();
  if (c.mended) copies_wait<0>();
  __syncthreads();
  copies_wait<0>();
  store(c, m.boxes[(threadIdx.x + 32) % THREADS * 16]);
}

__global__ void a_stage_of_copies_filled_while_it_is_read(Case c) {
  const Memory m;
  float sum = 0.f;
  for (int i = 0; i < 2; ++i) {
    copy16_async(m.boxes + threadIdx.x * 16, c.input, true);
    copies_commit();
    copies_wait<0>();
    __syncthreads();
    sum += m.boxes[(threadIdx.x + 32) % THREADS * 16];
    if (c.mended) __syncthreads();
  }
  store(c, sum);
}

__global__ void a_place_refilled_before_all_gave_it_back(Case c) {
  const Memory m;
  m.begin(c.mended ? THREADS / 32 : THREADS / 64);
  float sum = 0.f;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) barrier_wait(m.empty, i % 2 ^ 1);
    m.fill(c, 0, i % 2);
    sum += m.boxes[threadIdx.x * 16];
    __syncwarp();
    if (threadIdx.x % 32 == 0 && (c.mended || threadIdx.x < THREADS / 2)) barrier_arrive(m.empty);
  }
  store(c, sum);
}

__global__ void given_back_before_it_is_read(Case c) {
  const Memory m;
  m.begin(THREADS / 32);
  float sum = 0.f;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) barrier_wait(m.empty, i % 2 ^ 1);
    m.fill(c, 0, i % 2);
    if (!c.mended && threadIdx.x % 32 == 0) barrier_arrive(m.empty);
    sum += m.boxes[threadIdx.x * 16];
    __syncwarp();
    if (c.mended && threadIdx.x % 32 == 0) barrier_arrive(m.empty);
  }
  store(c, sum);
}

__global__ void a_bulk_copy_that_nobody_waits_for(Case c) {
  const Memory m;
  m.begin(1);
  if (c.mended) {
    m.fill(c, 0, 0);
  } else if (threadIdx.x == 0) {
    barrier_expect(m.full, BOX);
    copy_box(m.boxes, &c.map, m.full, 0, 0);
  }
  store(c, m.boxes[threadIdx.x * 16]);
  barrier_wait(m.full, 0);
}

__global__ void a_barrier_that_may_not_be_initialised(Case c) {
  const Memory m;
  if (threadIdx.x == 0) barrier_init(m.full, THREADS / 32);
  if (c.mended) __syncthreads();
  if (threadIdx.x % 32 == 0) barrier_arrive(m.full);
}

// The first group multiplies 64 rows in the third box by 128 in the first two.
void multiply_boxes(const Memory& m, float (&d)[16][4], bool fenced = true) {
  if (fenced) products_begin();
  multiply_group(d, swizzled_operand(shared_address(m.boxes + 2 * BOX)), swizzled_operand(shared_address(m.boxes)),
                 false, __half());
  products_commit();
}

__global__ void an_operand_replaced_before_its_product_is_done(Case c) {
  const Memory m;
  m.begin_with_operands(c);
  float d[16][4];
  if (threadIdx.x < 128) {
    multiply_boxes(m, d);
    if (c.mended) products_wait<0>();
  }
  __syncthreads();
  m.fill(c, 0, 1);
  if (threadIdx.x < 128) products_wait<0>();
}

__global__ void an_operand_that_a_thread_wrote(Case c) {
  const Memory m;
  m.begin_with_operands(c);
  if (!c.mended && threadIdx.x == 200) m.boxes[4] = 1;
  __syncthreads();
  float d[16][4];
  if (threadIdx.x < 128) {
    multiply_boxes(m, d);
    products_wait<0>();
  }
}

__global__ void blocks_of_a_cluster_meet_each_for_itself(Case c) {
  const Memory m;
  cluster_meet();
  m.numbers[threadIdx.x] = 1.f;
  if (c.mended)
    cluster_meet();
  else
    __syncthreads();
  store(c, in_block(m.numbers, 1 - cluster_rank())[threadIdx.x]);
  cluster_meet();
}

__global__ void blocks_that_only_know_of_each_other(Case c) {
  const Memory m;
  m.numbers[threadIdx.x] = 1.f;
  if (c.mended)
    cluster_meet();
  else
    cluster_started();
  store(c, in_block(m.numbers, 1 - cluster_rank())[threadIdx.x]);
  cluster_meet();
}

__global__ void a_block_ends_while_the_other_reads(Case c) {
  const Memory m;
  m.numbers[threadIdx.x] = 1.f;
  cluster_meet();
  store(c, in_block(m.numbers, 1 - cluster_rank())[threadIdx.x]);
  if (c.mended) cluster_meet();
}

__global__ void a_block_that_may_not_have_started(Case c) {
  const Memory m;
  if (c.mended) cluster_started();
  in_block(m.numbers, 1 - cluster_rank())[threadIdx.x] = 1.f;
  cluster_meet();
}

__global__ void two_blocks_write_one_address(Case c) {
  c.output[threadIdx.x + (c.mended ? blockIdx.x * THREADS : 0)] = 1;
}

__global__ void a_block_reads_what_another_wrote(Case c) {
  float* x = reinterpret_cast<float*>(c.output);
  if (c.mended || blockIdx.x != 3) store(c, 1.f);
  if (!c.mended && blockIdx.x == 3) store(c, x[threadIdx.x]);
}

__global__ void a_block_writes_what_another_read(Case c) {
  float* x = reinterpret_cast<float*>(c.output);
  store(c, x[(c.mended ? blockIdx.x : (blockIdx.x + 1) % 4) * THREADS + threadIdx.x]);
}

__global__ void barriers_that_are_not_ready_for_bulk_copies(Case c) {
  const Memory m;
  if (threadIdx.x == 0) {
    barrier_init(m.full, 1);
    if (c.mended) barriers_ready();
  }
  cluster_meet();
  m.fill(c, 0, 0);
}

__global__ void products_without_a_fence_of_registers(Case c) {
  const Memory m;
  m.begin_with_operands(c);
  float d[16][4];
  if (threadIdx.x >= 128) return;
  multiply_boxes(m, d, c.mended);
  products_wait<0>();
}

__global__ void a_read_past_the_end(Case c) {
  const auto* words = reinterpret_cast<const float*>(shared_memory());
  if (threadIdx.x == 0) store(c, words[(40 << 10) / 4 - (c.mended ? 1 : 0)]);
}

__global__ void a_copy_past_the_end(Case c) {
  if (threadIdx.x == 0) copy16_async(shared_memory() + (40 << 10) - (c.mended ? 16 : 0), c.input, true);
  copies_commit();
  copies_wait<0>();
}

__global__ void a_store_to_global_memory_of_a_shared_address(Case c) {
  const Memory m;
  void* to = c.mended ? static_cast<void*>(c.output + 16 * (blockIdx.x * THREADS + threadIdx.x) / 4) : m.numbers;
  if (threadIdx.x % 4 == 0) store16_global(to, uint4{1, 2, 3, 4});
}

#define FFCL_CASE(NAME) {#NAME, NAME}
const std::pair<const char*, void (*)(Case)> cases[] = {
    FFCL_CASE(no_barrier_before_a_read),
    FFCL_CASE(no_barrier_before_the_next_write),
    FFCL_CASE(a_barrier_of_half_the_threads),
    FFCL_CASE(nothing_within_a_warp),
    FFCL_CASE(a_shuffle_for_a_fence),
    FFCL_CASE(ldmatrix_without_a_barrier),
    FFCL_CASE(two_threads_store_the_same_half_word),
    FFCL_CASE(copies_that_only_another_warp_waits_for),
    FFCL_CASE(a_wait_after_the_barrier),
    FFCL_CASE(a_stage_of_copies_filled_while_it_is_read),
    FFCL_CASE(a_place_refilled_before_all_gave_it_back),
    FFCL_CASE(given_back_before_it_is_read),
    FFCL_CASE(a_bulk_copy_that_nobody_waits_for),
    FFCL_CASE(a_barrier_that_may_not_be_initialised),
    FFCL_CASE(an_operand_replaced_before_its_product_is_done),
    FFCL_CASE(an_operand_that_a_thread_wrote),
    FFCL_CASE(blocks_of_a_cluster_meet_each_for_itself),
    FFCL_CASE(blocks_that_only_know_of_each_other),
    FFCL_CASE(a_block_ends_while_the_other_reads),
    FFCL_CASE(a_block_that_may_not_have_started),
    FFCL_CASE(two_blocks_write_one_address),
    FFCL_CASE(a_block_reads_what_another_wrote),
    FFCL_CASE(a_block_writes_what_another_read),
    FFCL_CASE(barriers_that_are_not_ready_for_bulk_copies),
    FFCL_CASE(products_without_a_fence_of_registers),
    FFCL_CASE(a_read_past_the_end),
    FFCL_CASE(a_copy_past_the_end),
    FFCL_CASE(a_store_to_global_memory_of_a_shared_address),
};

}  // namespace

std::vector<std::string> race_names() {
  std::vector<std::string> names;
  for (const auto& c : cases) names.push_back(c.first);
  return names;
}

void run_race(const std::string& name, bool mended) {
  std::vector<unsigned char> input(BOX), output(4 * THREADS * sizeof(float));
  const Case c{mended, {input.data(), {64, 64}, 128, {64, 64}}, input.data(), output.data()};
  int status = bad_argument;
  for (const auto& [known, kernel] : cases)
    if (name == known) status = launch(kernel, Grid{4, THREADS, 40 << 10, 2}, nullptr, c);
  if (status != ok) throw std::invalid_argument(name + " did not run: status " + std::to_string(status));
}

}  // namespace ffcl
