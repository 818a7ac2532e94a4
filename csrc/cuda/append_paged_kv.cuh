// Writes new keys and values to their slots and the metadata of each touched page afresh from its stored keys, by one
// warp a token and head: the first token of a page's run does the whole page, the others nothing. Alone, in a grid (N,
// Hkv), or by blocks that a decode step's launch has to spare. Bound by latency: a decode step touches one page a
// sequence and head.
#pragma once
#include "page_bounds.cuh"

namespace quest::cuda {

__device__ __forceinline__ int64_t slot_of(const AppendParams& p, int token) {
    if (p.slot_mapping) return p.slot_mapping[token];
    const int block_size = p.page_size * p.pages_per_block;
    const int at = min(p.seq_lens[token], p.paging.max_blocks * block_size) - 1;
    if (at < 0) return -1;
    const int64_t entry = token / p.rows_per_request * p.paging.table_stride + at / block_size;
    return int64_t(p.paging.block_table[entry]) * block_size + at % block_size;
}

// Whether the nearest earlier token that is not skipped goes to the same page.
__device__ __forceinline__ bool continues_page(const AppendParams& p, int token, uint32_t page) {
    for (int earlier = token - 1; earlier >= 0; --earlier) {
        const int64_t slot = slot_of(p, earlier);
        if (slot >= 0) return slot >> log2_of(p.page_size) == page;
    }
    return false;
}

template <class T, class M, int D>
__device__ __forceinline__ void append_by_warp(const AppendParams& p, int token, int head) {
    constexpr int kLanesPerRow = D / 8;
    const int lane = threadIdx.x % kWarp;
    const int64_t slot = slot_of(p, token);
    if (slot < 0) return;
    const int page_shift = log2_of(p.page_size);
    const auto page = static_cast<uint32_t>(slot >> page_shift);
    if (continues_page(p, token, page)) return;

    const int64_t block = page / p.pages_per_block;
    const int part = page % p.pages_per_block;
    T* keys = static_cast<T*>(p.k_cache.data) + block * p.k_cache.block_stride +
              part * p.page_size * p.k_cache.token_stride + head * p.k_cache.head_stride;
    T* values = static_cast<T*>(p.v_cache.data) + block * p.v_cache.block_stride +
                part * p.page_size * p.v_cache.token_stride + head * p.v_cache.head_stride;
    int highest = 0;
    for (int i = token; i < p.num_tokens; ++i) {
        const int64_t at = slot_of(p, i);
        if (at < 0) continue;
        if (at >> page_shift != page) break;
        const int offset = static_cast<int>(at) & (p.page_size - 1);
        highest = max(highest, offset);
        for (int piece = lane; piece < 2 * kLanesPerRow; piece += kWarp) {  // the key's pieces, then the value's
            const int channel = piece % kLanesPerRow * 8;
            const bool is_key = piece < kLanesPerRow;
            const T* from = row_of<T>(is_key ? p.key : p.value, i, head) + channel;
            T* to =
                (is_key ? keys + offset * p.k_cache.token_stride : values + offset * p.v_cache.token_stride) + channel;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        }
    }
    __syncwarp();  // orders the warp's stores before its loads below
    M* bounds = static_cast<M*>(p.metadata.data) + block * p.metadata.block_stride + head * p.metadata.head_stride +
                part * (2 * D);
    store_page_bounds<T, M, D>(keys, p.k_cache.token_stride, highest + 1, p.bound, bounds);
}

template <class T, class M, int D>
__global__ void __launch_bounds__(kWarp) append_paged_kv_kernel(const __grid_constant__ AppendParams p) {
    wait_for_predecessor();
    // The bounds of pages that are not a request's last two may be read by a successor that starts early.
    const bool last_tokens = p.seq_lens && p.rows_per_request <= p.page_size;
    if (last_tokens) let_successor_start();
    append_by_warp<T, M, D>(p, blockIdx.x, blockIdx.y);
    if (!last_tokens) __threadfence();
}

// Everything, by blocks number `first` and later of a grid. Not inline: the other blocks' code would be longer to
// fetch.
template <class T, class M, int D>
__device__ __noinline__ void append_by_spare_blocks(const AppendParams& p, int first) {
    const int warps = blockDim.x / kWarp, items = p.num_tokens * p.num_kv_heads;
    for (int item = (blockIdx.x - first) * warps + threadIdx.x / kWarp; item < items;
         item += (gridDim.x - first) * warps)
        append_by_warp<T, M, D>(p, item / p.num_kv_heads, item % p.num_kv_heads);
}

}  // namespace quest::cuda
