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

// How many pages that is; 0: nothing is to be read early.
__device__ __forceinline__ int guess_pages(const FusedParams& p, const PageTable& table, int row) {
    if (p.recent_pages < 2) return 0;
    const int num_pages = table.pages(guess_tokens(p, table, row));
    return num_pages > p.page_budget ? num_pages : 0;
}

// The blocks of pages g and g + 8 of a tile; 0 for the last page, whose bounds are not needed, and for what is none.
template <class Deal>
__device__ __forceinline__ void guess_blocks(int (&blocks)[2], const AttentionParams& a, const PageTable& table,
                                             const Deal& deal, int tile, int num_pages) {
#pragma unroll
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
        const int page = deal.page(tile, threadIdx.x % kWarp / 4 + 8 * half_tile);
        const auto* from = reinterpret_cast<const uint32_t*>(table.blocks + table.entry(page));
        const unsigned block = page < num_pages - 1 ? peek_word(from) : 0;
        blocks[half_tile] = block < unsigned(a.num_blocks) ? block : 0;
    }
}

// For dense attention: keys and values of a row that has no more than a tile for each warp are brought near.
template <class T, int D>
__device__ __forceinline__ void guess_page(const FusedParams& p, const PageTable& table, int row, int kv_head, int page,
                                           int most_tokens) {
    const int tokens = guess_tokens(p, table, row);
    if (tokens > most_tokens || page >= table.pages(tokens)) return;
    const int block = peek_word(reinterpret_cast<const uint32_t*>(table.blocks + table.entry(page)));
    if (block >= 0 && block < p.attention.num_blocks) prefetch_page<T, D>(p.attention, table, kv_head, page, block);
}

}  // namespace quest::cuda
