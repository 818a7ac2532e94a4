// The score of every page of a row.
// Grid (blocks that walk the pages, Hkv, R), 16 pages a warp; no shared memory.
// Bound by reading the metadata: 2 D elements a page and KV head.
#pragma once
#include "packed_tile.cuh"

namespace quest::cuda {

template <class T, class M, int D>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) estimate_page_scores_kernel(const EstimateParams p) {
    let_successor_start();
    wait_for_predecessor();

    const int row = blockIdx.z, kv_head = blockIdx.y;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
    const PageTable table(p.paging, row / p.rows_per_request);
    const int group = p.num_q_heads / p.num_kv_heads, max_pages = table.max_pages,
              num_pages = table.pages(table.visible(p.seq_lens[row]));
    if (p.skip_pages > 0 && num_pages <= p.skip_pages) return;
    const int last = p.fill_tail ? max_pages : num_pages;
    using Tile = PageTile<T, M, D>;
    const char* metadata = Tile::lane_part(p.metadata, kv_head);
    const uint32_t block_bytes = bytes_of<M>(p.metadata.block_stride);
    const QueryParts<T> parts(p.metadata.points);
    const bool by_query_head = p.head_reduction == HeadReduction::kNone;

    auto store = [&](int64_t heads, int head, int page, float score) {
        if (page < last) p.scores[(row * heads + head) * max_pages + page] = page < num_pages ? score : -INFINITY;
    };
    for (int first = (blockIdx.x * kWarpsPerBlock + warp) * kTileTokens; first < last;
         first += gridDim.x * kWarpsPerBlock * kTileTokens) {
        if (first >= num_pages) {  // nothing to read
            for (int head = lane / kTileTokens; head < (by_query_head ? group : 1); head += 2)
                store(by_query_head ? p.num_q_heads : p.num_kv_heads, by_query_head ? kv_head * group + head : kv_head,
                      first + lane % kTileTokens, -INFINITY);
            continue;
        }
        PagePlace places[2];
#pragma unroll
        for (int half_tile = 0; half_tile < 2; ++half_tile) {
            const int page = min(first + g + 8 * half_tile, num_pages - 1);
            places[half_tile] = {table.block(page), table.part(page)};
        }
        Tile tile;
        tile.load({metadata, block_bytes, places});
        HeadReducer reducer(p.head_reduction);
        for (int first_head = 0; first_head < group; first_head += 8) {
            typename Tile::Query query[D / 32];
            const T* head = row_of<T>(p.query, row, kv_head * group + min(first_head + g, group - 1));
#pragma unroll
            for (int c = 0; c < D / 32; ++c)
                query[c] = Tile::prepare(*reinterpret_cast<const uint4*>(head + Tile::channel(c)), parts);
            float c[4];
            tile.multiply(c, parts, [&](int chunk) { return query[chunk]; }, [](int) {});
            reducer.include(c, first_head, group);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (by_query_head && first_head + 2 * t + i % 2 < group)
                    store(p.num_q_heads, kv_head * group + first_head + 2 * t + i % 2, first + g + i / 2 * 8, c[i]);
        }
        const float score = reducer.score(group);
        if (t < 2 && !by_query_head) store(p.num_kv_heads, kv_head, first + g + 8 * t, score);
    }
}

}  // namespace quest::cuda
