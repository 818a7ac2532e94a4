// What a block of a team does in a decode step of one launch (quest_decode_attention.cuh): it scores its tiles of pages
// and publishes their keys, finds the same selection as its team from all keys, attends to its share of the chosen
// pages, and merges a slice of the output. Blocks exchange words through L2, and a word is its own flag: 0 means not
// written yet. Every word that was written is zero again when the launch ends, so a workspace that starts as zeros
// serves any number of launches.
//
// In a decoder this code is no longer in L2 when its turn comes, and fetching it is part of the time: loops that run
// once or twice are not unrolled, and what is seldom needed is called.
#pragma once
#include "launch.h"
#include "team_guess.cuh"
#include "team_inputs.cuh"
#include "team_merge.cuh"
#include "team_shortlist.cuh"

namespace quest::cuda {

// kChunks: of keys that a block looks at; 0: it looks at shortlists. Without metadata (M = void) nothing is scored.
template <class T, class M, int D, int kChunks>
__device__ __forceinline__ void decode_by_team(const FusedParams& p, const int size_log2, uint32_t* workspace,
                                               const bool alone, const TeamPlace place) {
    constexpr bool kScores = !std::is_void_v<M>, kLists = kChunks == 0;
    // [warps, head_offset(group)]; before that, each warp's keys, then perhaps the chosen pages.
    extern __shared__ __align__(16) float warp_out[];
    __shared__ typename BlockSelect<kTeamThreads>::Shared selecting;
    // Of at least two blocks' turns. From shortlists half of the entries are chosen at most.
    __shared__ uint32_t chosen_pages[kScores ? (kLists ? kShortlistEntries / 4 : kChunks * kKeysAtOnce / 2) : 1];
    __shared__ WarpSums<kTeamWarps> sums;
    __shared__ SharedQuery<T, M, D> query;
    const AttentionParams& a = p.attention;
    __shared__ TeamPlace kept_place;  // until the merge: the registers are needed for loads in flight
    if (threadIdx.x == 0) kept_place = place;
    const int size = 1 << size_log2, team = place.team, rank = place.rank, kv_head = place.kv_head, row = place.row;
    const int group = a.num_q_heads / a.num_kv_heads;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
    const PageTable table(a.paging, a.rows_per_request == 1 ? row : row / a.rows_per_request);
    const TeamSpace space(workspace, team, size, group, D, kScores ? table.max_pages : 0);
    // Columns past the group repeat its last head.
    const T* query_from = query.chunk_of(row_of<T>(a.query, row, kv_head * group + min(g, group - 1)));
    const int32_t* length_from = RowLengths::word_of(p, row, team);
    mark_phase(0);
    const PageDeal<kLists> deal{warp * size + rank, kTeamWarps * size};
    uint32_t* chosen = chosen_pages;
    bool listed = false;
    RowLengths row_lengths;
    int &tokens = row_lengths.tokens, &num_pages = row_lengths.num_pages, &kept = row_lengths.kept;

    if constexpr (kScores) {
        using Tile = PageTile<T, M, D>;
        BlockSelect<kTeamThreads> select{selecting};
        select.clear_bins();
        const char* metadata = Tile::lane_part(p.metadata, kv_head);
        const uint32_t block_bytes = bytes_of<M>(p.metadata.block_stride);
        constexpr int kTilesAhead = std::is_same_v<M, __nv_fp8_e4m3> ? 2 : 1;  // up to 64 registers of a lane in flight
        Tile tiles[kTilesAhead];
        auto source_of = [&](const int (&blocks)[2], int tile) {
            const PagePlace places[2] = {{blocks[0], table.part(deal.page(tile, g))},
                                         {blocks[1], table.part(deal.page(tile, g + 8))}};
            return typename Tile::Source(metadata, block_bytes, places);
        };
        int guess[kTilesAhead + 1][2];  // -1: none
#pragma unroll
        for (int i = 0; i <= kTilesAhead; ++i) guess[i][0] = guess[i][1] = -1;
        if (p.recent_pages >= 2) {  // else nothing is to be read early
            // All asked for at once, lest a cold step wait for memory twice; before shortlists that took longer.
            const int all = table.pages(guess_tokens(p, table, row));
            if constexpr (!kLists)
#pragma unroll
                for (int i = 0; i < kTilesAhead; ++i) guess_blocks(guess[i], table, deal, i);
            const int pages = all > p.page_budget ? all : 0;
#pragma unroll
            for (int i = 0; i < kTilesAhead; ++i) {
                if (deal.first(i) < pages) {
                    if constexpr (kLists) guess_blocks(guess[i], table, deal, i);
                    keep_readable(guess[i], a, deal, i, pages);
                    tiles[i].load(source_of(guess[i], i));
                } else {
                    guess[i][0] = guess[i][1] = -1;
                }
            }
            if (kLists && size == kMaxTeam && deal.first(kTilesAhead) < pages) {
                guess_blocks(guess[kTilesAhead], table, deal, kTilesAhead);
                keep_readable(guess[kTilesAhead], a, deal, kTilesAhead, pages);
            }
        }
        wait_for_predecessor();
        mark_phase(1);

        const auto asked_query = query.ask(query_from);  // first: it is what the others wait for
        const int asked = *length_from;
        auto block_of = [&](int page, int end) { return page < end ? table.block(page) : 0; };
        auto blocks_at = [&](int (&blocks)[2], int tile, int end) {
            blocks[0] = block_of(deal.page(tile, g), end), blocks[1] = block_of(deal.page(tile, g + 8), end);
        };
        int first_blocks[kTilesAhead][2], blocks[2];
#pragma unroll
        for (int i = 0; i < kTilesAhead; ++i) blocks_at(first_blocks[i], i, table.max_pages);
        if constexpr (!kLists) table.prefetch();
        // Until the query is here, the memory may as well bring the next tile near.
        if (kLists && guess[kTilesAhead][0] >= 0) Tile::prefetch(source_of(guess[kTilesAhead], kTilesAhead));
        row_lengths.take(asked, p, table);
        // Score: tiles of 16 pages. The last page, and pages that do not exist, take block 0.
        if (kept < num_pages) {
#pragma unroll
            for (int i = 0; i < kTilesAhead; ++i) {
                if (deal.first(i) >= num_pages) break;
                if (deal.page(i, g) >= num_pages - 1) first_blocks[i][0] = 0;
                if (deal.page(i, g + 8) >= num_pages - 1) first_blocks[i][1] = 0;
                if (__any_sync(kAllLanes, first_blocks[i][0] != guess[i][0] || first_blocks[i][1] != guess[i][1]))
                    tiles[i].load(source_of(first_blocks[i], i));
            }
            blocks_at(blocks, kTilesAhead, num_pages - 1);
        }
        query.keep(asked_query, p.metadata.points);
        __syncthreads();
        if (kept < num_pages) {
            uint32_t best_key = 0;
            int best_page = 0;
            const int first_forced = num_pages - p.recent_pages, capacity = warp_keys_capacity(table.max_pages, size);
            WarpKeys mine{reinterpret_cast<uint32_t*>(warp_out) + warp * capacity, 0, {deal.warp, deal.num_warps}};
            // The next launch reads its first bounds while this one's blocks meet and the memory rests: best asked for
            // after the last of this one's own. It takes a microsecond to get there.
            const bool starts_early = kLists ? size < kMaxTeam : !Tile::kNarrow || deal.first(1) >= num_pages;
            int tile = 0;
            while (deal.first(tile) < num_pages) {
#pragma unroll
                for (int i = 0; i < kTilesAhead; ++i) {
                    if (deal.first(tile) >= num_pages) break;
                    const int next = tile + kTilesAhead;
                    const bool has_next = deal.first(next) < num_pages;
                    if (starts_early && !has_next) let_successor_start();
                    const typename Tile::Source source = source_of(blocks, next);
                    blocks_at(blocks, next + 1, num_pages - 1);
                    float c[4];
                    tiles[i].multiply(
                        c, QueryParts<T>(p.metadata.points), [&](int chunk) { return query.to_score(chunk); },
                        [&](int part) {
                            if (has_next) tiles[i].load_part(source, part);
                            __syncwarp();  // in this order: ptxas would ask late
                        });
                    HeadReducer reducer(p.head_reduction);
                    reducer.include(c, 0, group);
                    const uint32_t key = sort_key(reducer.score(group));
                    const int page = deal.page(tile, g + 8 * t);
                    if constexpr (kLists) {
                        const bool forced = page < p.sink_pages || page >= first_forced;
                        if (t < 2)
                            mine.keys[tile * kTileTokens + g + 8 * t] = page >= num_pages ? 1
                                                                        : forced          ? kForcedKey
                                                                                          : key;
                        mine.tiles = tile + 1;
                    }
                    if constexpr (!kLists) {  // words are read by four
                        if (t < 2 && page < (num_pages + 3) / 4 * 4)
                            publish(space.keys + page, page < num_pages ? key : 1);
                    }
                    if (t < 2 && page < num_pages && key > best_key) best_key = key, best_page = page;
                    ++tile;
                }
            }
            // A warp's best page, likely to be chosen, is fetched while the blocks exchange keys; of pages of 8 or 4 in
            // smaller teams the best two that different lanes have seen. Where the memory has the next launch's bounds
            // to fetch meanwhile, all of 16 bits, it does not pay.
            if (size < kMaxTeam || Tile::kNarrow) {
                const uint32_t best = __reduce_max_sync(kAllLanes, best_key);
                const int finder = __ffs(__ballot_sync(kAllLanes, best_key == best)) - 1;
                int page = __shfl_sync(kAllLanes, best_page, finder);
                if (table.page_shift <= 3 && size < kMaxTeam) {
                    if (lane == finder) best_key = 0;
                    const uint32_t next = __reduce_max_sync(kAllLanes, best_key);
                    const int other =
                        __shfl_sync(kAllLanes, best_page, __ffs(__ballot_sync(kAllLanes, best_key == next)) - 1);
                    if (next != 0 && lane % kTileTokens >= 8) page = other;
                }
                if (best != 0) prefetch_page<T, D>(a, table, kv_head, page, table.block(page));
            }
            const bool lists = kLists && kept <= kShortlistEntries / 2;
            if constexpr (kLists) {
                __syncwarp();
                const unsigned slots = kShortlistEntries / kTeamWarps >> size_log2, at = rank * kTeamWarps + warp;
                if (lists) mine.publish_shortlist(space.entries + at * slots * 2, space.bounds + at, slots);
            }
            if (size < kMaxTeam) {
                __syncthreads();  // all of the block's keys are on their way
                if (threadIdx.x == 0) publish(space.done + rank, 1u);
            }
            let_successor_start();
            mark_phase(2);
            wait_for_team(space, size);
            if constexpr (kLists) {
                if (lists) listed = select_listed({chosen, rank, size_log2}, space, select, kept, size);
                if (!listed) {
                    mine.publish_all(space.keys, num_pages);
                    chosen = reinterpret_cast<uint32_t*>(warp_out);
                    select_published({chosen, rank, size_log2}, space.done, space.keys, &selecting, num_pages, kept);
                }
            } else {
                select_pages<kChunks>({chosen, rank, size_log2}, space, select, num_pages, p.sink_pages, first_forced,
                                      kept);
            }
        }
    } else {
        if (alone)
            guess_page<T, D>(p, table, row, kv_head, (warp * kTileTokens >> table.page_shift << size_log2) + rank,
                             kTeamWarps * kTileTokens << size_log2);
        wait_for_predecessor();
        mark_phase(1);
        if (!alone) let_successor_start();
        const auto asked_query = query.ask(query_from);
        const int asked = *length_from;
        table.prefetch();
        row_lengths.take(asked, p, table);
        kept = num_pages;
        query.keep(asked_query, false);
        __syncthreads();
    }

    // Attend: every size-th of the chosen pages from `rank` on, 16 tokens a warp at a time.
    mark_phase(5);
    const int page_shift = table.page_shift, num_mine = (kept - rank + size - 1) >> size_log2;
    const float scale = a.sm_scale * kLog2E;
    // The pages of a tile's two halves, or of what of them begins at token `inner`; -1: the tile ends before.
    auto find_pages = [&](int (&pages)[2], int tile, int inner) {
#pragma unroll 1
        for (int slot = tile * kTileTokens + inner;; slot += 8) {
            const int index = slot >> page_shift;
            pages[1] = index >= num_mine ? -1 : kept < num_pages ? int(chosen[index]) : (index << size_log2) + rank;
            if (slot % kTileTokens < 8) pages[0] = pages[1];
            if (page_shift > 3 || slot % kTileTokens >= 8) break;
        }
    };
    auto run_of = [&](int page, int tile, int half_tile, int inner) -> Run {
        const int within = (tile * kTileTokens + 8 * half_tile + inner) & ((1 << page_shift) - 1);
        if (page < 0) return {0, 0, 0};
        const int first = (page << page_shift) + within, valid = min(tokens - first, 8 - inner);
        return {table.block(page), (table.part(page) << page_shift) + within - inner, inner + valid,
                p.append.num_tokens > 0 && first + valid == tokens};
    };
    using Tokens = TokenTile<T, D>;
    auto own_row = [&](const Rows& rows, int channel) {
        return reinterpret_cast<const char*>(row_of<T>(rows, kept_place.row, kept_place.kv_head) + channel);
    };
    auto own_key = [&] { return own_row(p.append.key, Tokens::key_channel()); };
    auto own_value = [&] { return own_row(p.append.value, Tokens::value_channel()); };
    const HeadRows<T> keys = Tokens::keys_of(a, kv_head), values = Tokens::values_of(a, kv_head);
    OnlineSoftmax<T, D> softmax;
    const int key_inner = page_in_run(page_shift, g), value_inner = page_in_run(page_shift, 2 * t);
    int tile = warp, pages[2];
    find_pages(pages, tile, key_inner);
    while (tile * kTileTokens < num_mine << page_shift) {
        const Run runs[2] = {run_of(pages[0], tile, 0, key_inner), run_of(pages[1], tile, 1, key_inner)};
        Run value_runs[2] = {runs[0], runs[1]};
        if (page_shift == 2) {
            find_pages(pages, tile, value_inner);
            value_runs[0] = run_of(pages[0], tile, 0, value_inner);
            value_runs[1] = run_of(pages[1], tile, 1, value_inner);
        }
        Tokens tile_tokens;
        auto is_whole = [](const Run& run) { return run.valid == 8 && !run.own; };
        const bool whole = is_whole(runs[0]) && is_whole(runs[1]) && is_whole(value_runs[0]) && is_whole(value_runs[1]);
        if (D <= 128 && __all_sync(kAllLanes, whole)) {
            tile_tokens.load_whole(keys, values, runs, value_runs);
        } else {
            tile_tokens.load_keys(keys, runs, own_key);
            if constexpr (D <= 128) tile_tokens.load_values(values, value_runs, own_value);
        }
        let_successor_start();  // where nothing was scored: not before most of what is needed is asked for
        tile += kTeamWarps;
        find_pages(pages, tile, key_inner);
        float score[4];
        softmax.scores_of(score, tile_tokens, [&](int c) { return query.to_attend(c); }, scale);
        if constexpr (D > 128) tile_tokens.load_values(values, value_runs, own_value);
        softmax.add(score, tile_tokens);
    }

    let_successor_start();
    if (kLists && chosen != chosen_pages) __syncthreads();  // warp_out is used again
    mark_phase(6);
    const TeamPlace again = kept_place;
    const TeamSpace mine(workspace, again.team, size, group, D, kScores ? table.max_pages : 0);
    merge_team<T, D>(a, mine, again, softmax, sums, warp_out, group, size_log2);
    mark_phase(9);
    // The first warp has seen a part of every block, so all have read the keys.
    if (kScores && kept < num_pages && warp == 0) {
        const bool lists = kLists && kept <= kShortlistEntries / 2;
        clear_exchange(mine, again.rank, size_log2, listed ? 0 : (num_pages + 3) / 4 * 4, lists);
    }
}

}  // namespace quest::cuda
