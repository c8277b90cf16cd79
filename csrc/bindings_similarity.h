// The Similarity of arguments as Python gives them; bindings_similarity.cpp.
#pragma once

#include "similarity.h"

ffcl::Similarity similarity_of(uintptr_t q, uintptr_t k, int64_t rows, int64_t cols, int64_t dim, int64_t q_stride,
                               int64_t k_stride, int dtype, float scale, uintptr_t row_ids, uintptr_t col_ids,
                               int exclude, int threads);
