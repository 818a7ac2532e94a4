// The door from torch to the CUDA kernels: device guard, current stream, scratch, errors. In a CPU-only build each call
// says how to build with CUDA.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "params.h"

namespace quest::cuda {

void append_paged_kv(const AppendParams& params, int32_t device);
void update_page_metadata(const UpdateParams& params, int32_t device);
void estimate_page_scores(const EstimateParams& params, int32_t device);
void select_topk_pages(const SelectParams& params, int32_t device);
// Appends first (num_tokens 0: nothing). Scratch for the partial results is allocated through torch beside `like`.
// Dense attention that has a workspace is one launch, where the planner says so, in most cases with the append.
void sparse_decode_attention(const AttentionParams& params, const AppendParams& append,
                             const torch::stable::Tensor& like, const std::optional<torch::stable::Tensor>& workspace);

// In one launch, where the planner says so, in most cases with the append; false, with nothing done, where the portable
// path is to be taken. Without a workspace, scratch is allocated through torch and cleared first.
bool fused_quest_decode_attention(FusedParams params, const torch::stable::Tensor& like,
                                  const std::optional<torch::stable::Tensor>& workspace);

}  // namespace quest::cuda
