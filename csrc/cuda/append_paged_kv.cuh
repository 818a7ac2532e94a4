// Writes new keys and values to their slots and the metadata of each touched page afresh from its stored keys.
// Grid (N, Hkv), one warp a token and head: the first token of a page's run does the whole page, the others leave.
// Bound by latency: a decode step touches one page a sequence and head.
#pragma once
#include "page_bounds.cuh"

namespace quest::cuda {

// Whether the nearest earlier token that is not skipped goes to the same page.
__device__ __forceinline__ bool continues_page(const int64_t* slots, int token, int64_t page, int page_size) {
    for (int earlier = token - 1; earlier >= 0; --earlier)
        if (slots[earlier] >= 0) return slots[earlier] / page_size == page;
    return false;
}

template <class T, class M, int D>
__global__ void __launch_bounds__(kWarp) append_paged_kv_kernel(const AppendParams p) {
    constexpr int kLanesPerRow = D / 8;
    let_successor_start();
    wait_for_predecessor();

    const int token = blockIdx.x, head = blockIdx.y, lane = threadIdx.x;
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0) return;
    const int64_t page = slot / p.page_size;
    if (continues_page(p.slot_mapping, token, page, p.page_size)) return;

    const int64_t block = page / p.pages_per_block;
    const int part = page % p.pages_per_block;
    T* keys = static_cast<T*>(p.k_cache.data) + block * p.k_cache.block_stride +
              part * p.page_size * p.k_cache.token_stride + head * p.k_cache.head_stride;
    T* values = static_cast<T*>(p.v_cache.data) + block * p.v_cache.block_stride +
                part * p.page_size * p.v_cache.token_stride + head * p.v_cache.head_stride;
    int highest = 0;
    for (int i = token; i < p.num_tokens; ++i) {
        const int64_t at = p.slot_mapping[i];
        if (at < 0) continue;
        if (at / p.page_size != page) break;
        const int offset = at % p.page_size;
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

}  // namespace quest::cuda
