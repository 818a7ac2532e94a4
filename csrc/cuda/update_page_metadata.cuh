// The metadata of every page that holds a token of [start, seq_len), from its stored keys.
// Grid (blocks that walk the pages, Hkv, B), a page a warp. Bound by reading the keys.
#pragma once
#include "page_bounds.cuh"

namespace quest::cuda {

template <class T, class M, int D>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, D <= 128 ? 5 : 4)
    update_page_metadata_kernel(const UpdateParams p) {
    wait_for_predecessor();  // and no successor starts early: it might read bounds at once

    const int request = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / kWarp, page_size = p.paging.page_size;
    const PageTable table(p.paging, request);
    const int tokens = table.visible(p.seq_lens[request]), start = max(p.start_lens[request], 0),
              num_pages = table.pages(tokens);
    if (start >= tokens) return;
    for (int page = (start >> table.page_shift) + blockIdx.x * kWarpsPerBlock + warp; page < num_pages;
         page += gridDim.x * kWarpsPerBlock) {
        const int block = table.block(page), part = table.part(page);
        const T* keys = page_rows<T>(p.k_cache, block, part, page_size, head);
        M* bounds = page_metadata<M, D>(p.metadata, block, part, head);
        store_page_bounds<T, M, D>(keys, p.k_cache.token_stride, min(page_size, tokens - page * page_size), p.bound,
                                   bounds);
    }
    __threadfence();
}

}  // namespace quest::cuda
