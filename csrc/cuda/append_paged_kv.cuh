// Writes new keys and values to their slots and the metadata of each touched page afresh from its stored keys, by one
// warp a token and head: the first token of a page's run does the whole page, the others nothing. Alone, in a grid (N,
// Hkv), or by blocks that a decode step's launch has to spare. Bound by latency: a decode step touches one page a
// sequence and head.
#pragma once
#include "page_bounds.cuh"

namespace quest::cuda {

// Where a token goes: to token `offset` of part `part` of a block. block < 0: nowhere.
struct TokenPlace {
    int block, part, offset;

    __device__ __forceinline__ bool shares_page(const TokenPlace& other) const {
        return block == other.block && part == other.part;
    }
};
__device__ __forceinline__ TokenPlace place_of(const AppendParams& p, int token) {
    const int shift = log2_of(p.page_size), within = p.page_size - 1;
    if (p.slot_mapping) {
        const int64_t slot = p.slot_mapping[token];
        if (slot < 0) return {-1, 0, 0};
        const auto page = static_cast<uint32_t>(slot >> shift);
        const uint32_t block = page / p.pages_per_block;
        return {int(block), int(page - block * p.pages_per_block), int(slot) & within};
    }
    const PageTable table(p.paging, p.rows_per_request == 1 ? token : token / p.rows_per_request);
    const int at = table.visible(p.seq_lens[token]) - 1, page = at >> shift;
    if (at < 0) return {-1, 0, 0};
    return {table.block(page), table.part(page), at & within};
}

// Whether the nearest earlier token that is not skipped goes to the same page.
__device__ __forceinline__ bool continues_page(const AppendParams& p, int token, const TokenPlace& place) {
#pragma unroll 1
    for (int earlier = token - 1; earlier >= 0; --earlier) {
        const TokenPlace other = place_of(p, earlier);
        if (other.block >= 0) return other.shares_page(place);
    }
    return false;
}

template <class T, class M, int D>
__device__ __forceinline__ void append_by_warp(const AppendParams& p, int token, int head) {
    constexpr int kLanesPerRow = D / 8;
    const int lane = threadIdx.x % kWarp;
    TokenPlace place = place_of(p, token);
    const TokenPlace first = place;
    if (place.block < 0 || continues_page(p, token, place)) return;

    auto page_of = [&](const Pool& pool) {
        return static_cast<T*>(pool.data) + first.block * pool.block_stride +
               first.part * p.page_size * pool.token_stride + head * pool.head_stride;
    };
    T* keys = page_of(p.k_cache);
    T* values = page_of(p.v_cache);
    int highest = 0;
#pragma unroll 1
    for (int i = token;;) {
        if (place.block >= 0) {
            if (!place.shares_page(first)) break;
            highest = max(highest, place.offset);
#pragma unroll 1
            for (int piece = lane; piece < 2 * kLanesPerRow; piece += kWarp) {  // the key's pieces, then the value's
                const int channel = piece % kLanesPerRow * 8;
                const bool is_key = piece < kLanesPerRow;
                const T* from = row_of<T>(is_key ? p.key : p.value, i, head) + channel;
                T* to = (is_key ? keys + place.offset * p.k_cache.token_stride
                                : values + place.offset * p.v_cache.token_stride) +
                        channel;
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            }
        }
        if (++i >= p.num_tokens) break;
        place = place_of(p, i);
    }
    __syncwarp();  // orders the warp's stores before its loads below
    M* bounds = static_cast<M*>(p.metadata.data) + first.block * p.metadata.block_stride +
                head * p.metadata.head_stride + first.part * kPageElements<M, D>;
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
