// What a block does while its predecessor drains: it looks ahead by lengths and block numbers as they are then, and
// brings into L2 what it will most likely need. Nothing read here decides anything.
#pragma once
#include "team.cuh"

namespace quest::cuda {

// A tile of pages that a warp scores early: its bounds are brought near by block numbers that may be about to change.
// Afterwards they are read at once, and again in the rare case that the numbers did change. Returns whether there is
// such a tile.
template <class M, int D, class Deal>
__device__ __forceinline__ bool guess_blocks(int (&blocks)[2], const FusedParams& p, const PageTable& table, int row,
                                             int kv_head, const Deal& deal, int tile) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int tokens = table.visible(peek_word(reinterpret_cast<const uint32_t*>(p.attention.seq_lens + row)));
    const int num_pages = table.pages(tokens);
#pragma unroll
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
        const int page = deal.page(tile, g + 8 * half_tile);
        blocks[half_tile] = 0;
        if (page >= num_pages - 1 || num_pages <= p.page_budget) continue;
        const int block = peek_word(reinterpret_cast<const uint32_t*>(table.blocks + table.entry(page)));
        if (block < 0 || block >= p.attention.num_blocks) continue;
        blocks[half_tile] = block;
        const M* bounds = static_cast<const M*>(p.metadata.data) + block * p.metadata.block_stride +
                          kv_head * p.metadata.head_stride + table.part(page) * (2 * D);
        constexpr int kLine = 128 / sizeof(M);
#pragma unroll 1
        for (int i = t * kLine; i < 2 * D; i += 4 * kLine) prefetch(bounds + i);
    }
    return num_pages > p.page_budget && deal.first(tile) < num_pages;
}

// For dense attention, the same for the keys and values of a row that has no more than a tile for each warp.
template <class T, int D>
__device__ __forceinline__ void guess_page(const FusedParams& p, const PageTable& table, int row, int kv_head, int page,
                                           int most_tokens) {
    const int tokens = table.visible(peek_word(reinterpret_cast<const uint32_t*>(p.attention.seq_lens + row)));
    if (tokens > most_tokens || page >= table.pages(tokens)) return;
    const int block = peek_word(reinterpret_cast<const uint32_t*>(table.blocks + table.entry(page)));
    if (block >= 0 && block < p.attention.num_blocks) prefetch_page<T, D>(p.attention, table, kv_head, page, block);
}

}  // namespace quest::cuda
