#include "sparse_decode_attention.cuh"

namespace quest::cuda {

static int32_t attention_items(const AttentionParams& p) { return p.num_kv_heads * groups_per_kv_head(p); }

int32_t attention_splits(const AttentionParams& p, Chip chip) {
    const int64_t pages = p.page_ids ? p.max_ids : p.paging.max_pages();
    return plan_attention_splits(chip, int64_t(p.num_rows) * attention_items(p),
                                 ceil_div(pages * p.paging.page_size, kTileTokens), p.head_dim,
                                 p.page_ids == nullptr && p.num_rows > 1);
}

cudaError_t launch_sparse_decode_attention(const AttentionParams& p, const AttentionScratch& scratch, Chip chip,
                                           cudaStream_t stream) {
    const int32_t items = attention_items(p), most_heads = std::min(ceil_div(p.num_q_heads, items), kGroupHeads);
    const dim3 grid(scratch.num_splits, items, p.num_rows), block(kWarp * kWarpsPerBlock);
    return dispatch(p.dtype, p.head_dim, [&](auto element, auto head_dim) {
        using T = decltype(element);
        constexpr int D = head_dim();
        const size_t shared_bytes = size_t(kWarpsPerBlock) * head_offset<D>(most_heads) * sizeof(float);  // below 34 KB
        const cudaError_t error =
            launch(sparse_decode_attention_kernel<T, D>, grid, block, shared_bytes, chip, stream, false, p, scratch);
        if (error != cudaSuccess || scratch.num_splits == 1) return error;
        return launch(merge_splits_kernel<T, D>, dim3(p.num_q_heads, p.num_rows), block, 0, chip, stream, false, p,
                      scratch);
    });
}

}  // namespace quest::cuda
