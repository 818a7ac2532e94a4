// What each .cu offers: a launch on a stream. Shapes are checked before; the result is CUDA's own error code.
#pragma once
#include <cuda_runtime_api.h>

#include "../params.h"
#include "../plan.h"

namespace quest::cuda {

cudaError_t launch_append_paged_kv(const AppendParams& params, Chip chip, cudaStream_t stream);
cudaError_t launch_update_page_metadata(const UpdateParams& params, Chip chip, cudaStream_t stream);
cudaError_t launch_estimate_page_scores(const EstimateParams& params, Chip chip, cudaStream_t stream);
cudaError_t launch_select_topk_pages(const SelectParams& params, Chip chip, cudaStream_t stream);

// Partial results of `num_splits` blocks a head; null where num_splits is 1.
struct AttentionScratch {
    int32_t num_splits;
    float* out;  // [num_splits, R, Hq, D], normalised
    float* lse;  // [num_splits, R, Hq], base 2
};
int32_t attention_splits(const AttentionParams& params, Chip chip);
cudaError_t launch_sparse_decode_attention(const AttentionParams& params, const AttentionScratch& scratch, Chip chip,
                                           cudaStream_t stream);

// By teams of 2^size_log2 blocks, which exchange the words of a workspace (plan.h): they must be zero when a launch
// starts, and are when it ends.
cudaError_t launch_clear(uint32_t* words, int64_t count, Chip chip, cudaStream_t stream);
cudaError_t launch_quest_decode_attention(const FusedParams& params, int32_t size_log2, uint32_t* workspace, Chip chip,
                                          cudaStream_t stream);
// Without a selection: of `params` the attention and what is to be appended.
cudaError_t launch_dense_decode_attention(const FusedParams& params, int32_t size_log2, uint32_t* workspace, Chip chip,
                                          cudaStream_t stream);

}  // namespace quest::cuda
