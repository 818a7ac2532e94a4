// Decode attention by teams in one launch (sm_90 and later): score, select, attend and merge; or, without metadata,
// attend to every page and merge. Grid: a team of blocks for each (row, KV head), places team * size + rank. Bound by
// reading the metadata and the chosen K and V, and by the latency of two exchanges.
//
// Blocks past the teams append the rows' last tokens, where the launch does that too. Nothing waits for them: the teams
// take these keys and values from the step's own ones, and a row's last page is always chosen, so its bounds, which
// change, need not be read.
#pragma once
#include "append_paged_kv.cuh"
#include "team_decode.cuh"

namespace quest::cuda {

// M: the metadata that is scored, void for dense attention; A: what is appended.
template <class T, class M, class A, int D, int kChunks>
__global__ void __launch_bounds__(kTeamThreads, D <= 128 ? 2 : 1)
    team_decode_attention_kernel(const __grid_constant__ FusedParams p, const int size_log2, uint32_t* workspace,
                                 const bool alone) {
#if __CUDA_ARCH__ >= 900
    const TeamPlace place = TeamPlace::of_block(blockIdx.x, size_log2, p.attention.num_kv_heads);
    if (place.row < unsigned(p.attention.num_rows)) {
        decode_by_team<T, M, D, kChunks>(p, size_log2, workspace, alone, place);
        return;
    }
    wait_for_predecessor();
    let_successor_start();
    const int of_teams = p.attention.num_rows * p.attention.num_kv_heads << size_log2;
    append_by_spare_blocks<T, A, D>(p.append, blockIdx.x - of_teams, gridDim.x - of_teams);
#endif
}

// What metadata is stored as, given the element type: as the elements are, or as M whatever they are. Each has a .cu.
struct StoredAlike {
    template <class T>
    using Of = T;
};
template <class M>
struct StoredAs {
    template <class T>
    using Of = M;
};

// Stored: of the metadata that is scored, or, in a dense launch, of that which is appended. Dense kernels are apart by
// what they append: code that a launch does not run makes fetching the rest slower.
template <class Stored>
cudaError_t launch_team_decode_attention(const FusedParams& p, bool dense, int32_t size_log2, uint32_t* workspace,
                                         Chip chip, cudaStream_t stream) {
    const AttentionParams& a = p.attention;
    const int32_t blocks = a.num_rows * a.num_kv_heads << size_log2;
    const bool alone = blocks <= chip.num_sms && size_log2 == kMaxTeamLog2;
    const int32_t grid = blocks + plan_spare_blocks(chip, blocks, a.head_dim, p.append.num_tokens * a.num_kv_heads);
    return dispatch(a.dtype, a.head_dim, [&](auto element, auto head_dim) {
        using T = decltype(element);
        constexpr int D = head_dim();
        using M = typename Stored::template Of<T>;
        auto kernel = team_decode_attention_kernel<T, void, M, D, 1>;
        if (!dense) {
            const int32_t chunks = ceil_div(a.paging.max_pages(), kKeysAtOnce);
            static_assert(kMostDirectPages == 4 * kKeysAtOnce);
            kernel = team_decode_attention_kernel<T, M, M, D, 0>;  // shortlists
            // In 4 bits pages are small and many: up to twice as many keys are still read faster than shortlists are
            // made.
            if constexpr (std::is_same_v<M, FourBits>)
                if (chunks <= 8) kernel = team_decode_attention_kernel<T, M, M, D, 8>;
            if (chunks <= 4) kernel = team_decode_attention_kernel<T, M, M, D, 4>;
            if (chunks <= 2) kernel = team_decode_attention_kernel<T, M, M, D, 2>;
        }
        size_t shared_bytes = size_t(kTeamWarps) * head_offset<D>(a.num_q_heads / a.num_kv_heads) * sizeof(float);
        if (!dense && a.paging.max_pages() > kMostDirectPages)
            shared_bytes = std::max(
                shared_bytes, kTeamWarps * sizeof(uint32_t) * warp_keys_capacity(a.paging.max_pages(), 1 << size_log2));
        if (shared_bytes > 24 * 1024) {  // beside the static part, more than a block gets unasked
            const cudaError_t error =
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
            if (error != cudaSuccess) return error;
        }
        return launch(kernel, grid, kTeamThreads, shared_bytes, chip, stream, starts_as_gang(chip, grid, D), p,
                      size_log2, workspace, alone);
    });
}

}  // namespace quest::cuda
