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
// Of a row's last token.
__device__ __forceinline__ TokenPlace place_of_last(const AppendParams& p, int row, int request) {
    const PageTable table(p.paging, request);
    const int at = table.visible(p.seq_lens[row]) - 1, page = at >> table.page_shift;
    if (at < 0) return {-1, 0, 0};
    return {table.block(page), table.part(page), at & (p.page_size - 1)};
}
__device__ __forceinline__ TokenPlace place_of(const AppendParams& p, int token) {
    if (!p.slot_mapping) return place_of_last(p, token, p.rows_per_request == 1 ? token : token / p.rows_per_request);
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0) return {-1, 0, 0};
    const auto page = static_cast<uint32_t>(slot >> log2_of(p.page_size));
    const uint32_t block = page / p.pages_per_block;
    return {int(block), int(page - block * p.pages_per_block), int(slot) & (p.page_size - 1)};
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

// A page's rows for a head, and the place of its metadata.
template <class T, class M, int D>
struct PageRows {
    const AppendParams& p;
    T *keys, *values;
    M* bounds;

    __device__ __forceinline__ PageRows(const AppendParams& p, const TokenPlace& place, int head)
        : p(p),
          keys(page_rows<T>(p.k_cache, place.block, place.part, p.page_size, head)),
          values(page_rows<T>(p.v_cache, place.block, place.part, p.page_size, head)),
          bounds(page_metadata<M, D>(p.metadata, place.block, place.part, head)) {}

    // By a whole warp: key and value of a token, to `offset` of the page. First the key's pieces, then the value's.
    __device__ __forceinline__ void write(int token, int head, int offset) const {
        constexpr int kLanesPerRow = D / 8;
#pragma unroll 1
        for (int piece = threadIdx.x % kWarp; piece < 2 * kLanesPerRow; piece += kWarp) {
            const int channel = piece % kLanesPerRow * 8;
            const bool is_key = piece < kLanesPerRow;
            const T* from = row_of<T>(is_key ? p.key : p.value, token, head) + channel;
            T* to =
                (is_key ? keys + offset * p.k_cache.token_stride : values + offset * p.v_cache.token_stride) + channel;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        }
    }
    // The metadata, from the first `count` stored keys.
    __device__ __forceinline__ void store_bounds_of(int count) const {
        __syncwarp();  // orders the warp's stores before its loads
        store_page_bounds<T, M, D>(keys, p.k_cache.token_stride, count, p.bound, bounds);
    }
};

template <class T, class M, int D>
__device__ __forceinline__ void append_by_warp(const AppendParams& p, int token, int head) {
    TokenPlace place = place_of(p, token);
    const TokenPlace first = place;
    if (place.block < 0 || continues_page(p, token, place)) return;

    const PageRows<T, M, D> page(p, first, head);
    int highest = 0;
#pragma unroll 1
    for (int i = token;;) {
        if (place.block >= 0) {
            if (!place.shares_page(first)) break;
            highest = max(highest, place.offset);
            page.write(i, head, place.offset);
        }
        if (++i >= p.num_tokens) break;
        place = place_of(p, i);
    }
    page.store_bounds_of(highest + 1);
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

// Everything, by `blocks` blocks of which this is one, where every row is a request of its own, so that no two tokens
// go to one page. Not inline: the other blocks' code would be longer to fetch.
template <class T, class M, int D>
__device__ __noinline__ void append_by_spare_blocks(const AppendParams& p, int block, int blocks) {
    const int warps = blockDim.x / kWarp, items = p.num_tokens * p.num_kv_heads;
#pragma unroll 1
    for (int item = block * warps + threadIdx.x / kWarp; item < items; item += blocks * warps) {
        const int row = item / p.num_kv_heads, head = item % p.num_kv_heads;
        const TokenPlace place = place_of_last(p, row, row);
        if (place.block < 0) continue;
        const PageRows<T, M, D> page(p, place, head);
        page.write(row, head, place.offset);
        page.store_bounds_of(place.offset + 1);
    }
}

}  // namespace quest::cuda
