// The CPU kernels, an op a file. Each is deterministic for any number of threads: how work is split depends on shapes
// alone.
#pragma once
#include <cstdint>
#include <functional>

#include "../params.h"

namespace quest::cpu {

void append_paged_kv(const AppendParams& p);
void update_page_metadata(const UpdateParams& p);
void estimate_page_scores(const EstimateParams& p);
void select_topk_pages(const SelectParams& p);
void sparse_decode_attention(const AttentionParams& p);

// Calls f(begin, end) over [0, count) on torch's thread pool; defined beside the torch code.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& f);

// What the kernels run with: "avx512", "avx2" or "plain"; chosen at run time, once.
const char* cpu_capability();

}  // namespace quest::cpu
