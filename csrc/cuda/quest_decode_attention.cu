#include "quest_decode_attention.cuh"

namespace quest::cuda {

namespace {
__global__ void clear_kernel(uint4* words, int64_t count) {
    let_successor_start();
    wait_for_predecessor();
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) words[i] = uint4{};
}
}  // namespace

cudaError_t launch_clear(uint32_t* words, int64_t count, Chip chip, cudaStream_t stream) {
    return launch(clear_kernel, ceil_div(count / 4, 256), 256, 0, chip, stream, false, reinterpret_cast<uint4*>(words),
                  count / 4);
}

int64_t fused_workspace_words(const FusedParams& p, const FusedPlan& plan) {
    const AttentionParams& a = p.attention;
    return int64_t(a.num_rows) * a.num_kv_heads *
           fused_team_words(1 << plan.team_log2, a.num_q_heads / a.num_kv_heads, a.head_dim, a.paging.max_pages());
}

cudaError_t launch_quest_decode_attention(const FusedParams& p, const FusedPlan& plan, uint32_t* workspace, Chip chip,
                                          cudaStream_t stream) {
    const AttentionParams& a = p.attention;
    const dim3 grid(1 << plan.team_log2, a.num_kv_heads, a.num_rows);
    const size_t list_entries = ceil_div(std::min(p.page_budget, a.paging.max_pages()), 1 << plan.team_log2);
    const size_t shared_bytes =
        (size_t(kTeamWarps) * (a.num_q_heads / a.num_kv_heads) * a.head_dim + list_entries) * sizeof(float);
    return dispatch(a.dtype, a.head_dim, [&](auto element, auto head_dim) {
        using T = decltype(element);
        constexpr int D = head_dim();
        auto kernel = plan.keys_per_thread == 8 ? quest_decode_attention_kernel<T, D, 8>
                                                : quest_decode_attention_kernel<T, D, 32>;
        if (shared_bytes > 40 * 1024) {  // beside the static part, more than a block gets unasked
            const cudaError_t error =
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
            if (error != cudaSuccess) return error;
        }
        return launch(kernel, grid, kTeamThreads, shared_bytes, chip, stream, true, p, plan, workspace);
    });
}

}  // namespace quest::cuda

#ifdef QUEST_PHASE_CLOCKS
extern "C" __attribute__((visibility("default"))) int quest_read_phase_clocks(long long* clocks) {
    return cudaMemcpyFromSymbol(clocks, quest::cuda::phase_clocks, sizeof(quest::cuda::phase_clocks));
}
#endif
