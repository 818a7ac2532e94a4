// What a block does while its predecessor drains: it looks ahead by lengths and block numbers as they are then. Bounds
// that are read so are used only where the block numbers turn out to be right; the rest is only brought near.
//
// A page's bounds are read early though a predecessor may still be writing to the caches. Therefore:
// - What writes to pages other than a request's last ones lets no successor start before it has written.
// - A launch of teams lets its successor start only after its own predecessors have ended. So one of them at most may
//   still be at work, and appends to pages that now are a request's last two.
// - Nothing is read early unless these two are chosen whatever their bounds say.
#pragma once
#include "team.cuh"

namespace quest::cuda {

// How long a row is, as far as is known.
__device__ __forceinline__ int guess_tokens(const FusedParams& p, const PageTable& table, int row) {
    return table.visible(peek_word(reinterpret_cast<const uint32_t*>(p.attention.seq_lens + row)));
}

// A page's block, as far as is known; page: of the table.
__device__ __forceinline__ int guess_block(const PageTable& table, int page) {
    return peek_word(reinterpret_cast<const uint32_t*>(table.blocks + table.entry(page)));
}

// Those of pages g and g + 8 of a tile.
template <class Deal>
__device__ __forceinline__ void guess_blocks(int (&blocks)[2], const PageTable& table, const Deal& deal, int tile) {
#pragma unroll
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
        const int page = deal.page(tile, threadIdx.x % kWarp / 4 + 8 * half_tile);
        blocks[half_tile] = page < table.max_pages ? guess_block(table, page) : 0;
    }
}

// Of guessed blocks, 0 for the last page, whose bounds are not needed, and for what is none.
template <class Deal>
__device__ __forceinline__ void keep_readable(int (&blocks)[2], const AttentionParams& a, const Deal& deal, int tile,
                                              int num_pages) {
#pragma unroll
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
        const int page = deal.page(tile, threadIdx.x % kWarp / 4 + 8 * half_tile);
        if (page >= num_pages - 1 || unsigned(blocks[half_tile]) >= unsigned(a.num_blocks)) blocks[half_tile] = 0;
    }
}

// For dense attention: keys and values of a row that has no more than a tile for each warp are brought near.
template <class T, int D>
__device__ __forceinline__ void guess_page(const FusedParams& p, const PageTable& table, int row, int kv_head, int page,
                                           int most_tokens) {
    if (page >= table.max_pages) return;
    const int tokens = guess_tokens(p, table, row), block = guess_block(table, page);
    if (tokens > most_tokens || page >= table.pages(tokens)) return;
    if (block >= 0 && block < p.attention.num_blocks) prefetch_page<T, D>(p.attention, table, kv_head, page, block);
}

}  // namespace quest::cuda
