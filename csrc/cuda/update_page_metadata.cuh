// The metadata of every page that holds a token of [start, seq_len), from its stored keys.
// Grid (blocks that walk the pages, Hkv, B), a page a warp. Bound by reading the keys.
#pragma once
#include "page_bounds.cuh"

namespace quest::cuda {

template <class T, int D>
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock) update_page_metadata_kernel(const UpdateParams p) {
    let_successor_start();
    wait_for_predecessor();

    const int request = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / kWarp;
    const int tokens = visible_tokens(p.seq_lens[request], p.paging), start = max(p.start_lens[request], 0);
    const int page_size = p.paging.page_size, pages_per_block = p.paging.pages_per_block;
    if (start >= tokens) return;
    const int num_pages = (tokens + page_size - 1) / page_size;
    const int32_t* table = p.paging.block_table + request * p.paging.table_stride;
    for (int page = start / page_size + blockIdx.x * kWarpsPerBlock + warp; page < num_pages; page += gridDim.x * kWarpsPerBlock) {
        const int64_t block = table[page / pages_per_block];
        const int part = page % pages_per_block;
        const T* keys = static_cast<const T*>(p.k_cache.data) + block * p.k_cache.block_stride +
                        part * page_size * p.k_cache.token_stride + head * p.k_cache.head_stride;
        T* bounds = static_cast<T*>(p.metadata.data) + block * p.metadata.block_stride + head * p.metadata.head_stride + part * (2 * D);
        store_page_bounds<T, D>(keys, p.k_cache.token_stride, min(page_size, tokens - page * page_size), bounds);
    }
}

}  // namespace quest::cuda
