// The score of every page of a row.
// Grid (blocks that walk the pages, Hkv, R), 16 pages a warp; no shared memory.
// Bound by reading the metadata: 2 D elements a page and KV head.
#pragma once
#include "score_tile.cuh"

namespace quest::cuda {

template <class T, int D>
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock) estimate_page_scores_kernel(const EstimateParams p) {
    let_successor_start();
    wait_for_predecessor();

    const int row = blockIdx.z, kv_head = blockIdx.y;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
    const int group = p.num_q_heads / p.num_kv_heads, max_pages = p.paging.max_blocks * p.paging.pages_per_block;
    const int tokens = visible_tokens(p.seq_lens[row], p.paging), num_pages = (tokens + p.paging.page_size - 1) / p.paging.page_size;
    if (p.skip_pages > 0 && num_pages <= p.skip_pages) return;
    const int last = p.fill_tail ? max_pages : num_pages;
    const int32_t* table = p.paging.block_table + row / p.rows_per_request * p.paging.table_stride;
    const T* metadata = static_cast<const T*>(p.metadata.data) + kv_head * p.metadata.head_stride;
    const bool by_query_head = p.head_reduction == HeadReduction::kNone;

    auto store = [&](int64_t heads, int head, int page, float score) {
        if (page < last) p.scores[(row * heads + head) * max_pages + page] = page < num_pages ? score : -INFINITY;
    };
    for (int first = (blockIdx.x * kWarpsPerBlock + warp) * kTileTokens; first < last; first += gridDim.x * kWarpsPerBlock * kTileTokens) {
        PageTile<T, D> tile;
        tile.load(metadata, p.metadata.block_stride, table, p.paging.pages_per_block, first, num_pages);
        float scores[2];
        score_tile(tile, row_of<T>(p.query, row, kv_head * group), p.query.head_stride, group, p.head_reduction == HeadReduction::kMax, scores,
                   [&](int column, int half_tile, float score) {
                       if (by_query_head) store(p.num_q_heads, kv_head * group + column, first + g + 8 * half_tile, score);
                   });
        if (t == 0 && !by_query_head) {
            store(p.num_kv_heads, kv_head, first + g, scores[0]);
            store(p.num_kv_heads, kv_head, first + g + 8, scores[1]);
        }
    }
}

}  // namespace quest::cuda
