// Score, select, attend and merge in one launch (sm_90 and later).
// Grid: a team of blocks for each (row, KV head), blocks team * size + rank, all of them resident. Each block scores
// its tiles of pages and publishes their keys; each finds the same selection from all keys; the chosen pages are dealt
// out evenly; each block merges a slice of the output. Blocks exchange words through L2, and a word is its own flag: 0
// means not written yet. Every word that was written is zero again when the launch ends, so a workspace that starts as
// zeros serves any number of launches. Bound by reading the metadata and the chosen K and V, and by the latency of two
// exchanges.
#pragma once
#include "attend_tile.cuh"
#include "launch.h"
#include "score_tile.cuh"
#include "team.cuh"
#include "topk_threshold.cuh"

namespace quest::cuda {

constexpr int kTeamThreads = 256, kTeamWarps = kTeamThreads / kWarp;

struct FusedShared {
    BlockSelect<kTeamThreads>::Shared select;
    float top[kTeamWarps][kGroupHeads], sum[kTeamWarps][kGroupHeads];
};

// Finds the selection from the team's published keys and lists the pages that are dealt to this block, in order.
template <int kKeys>
__device__ __forceinline__ void deal_selected_pages(const FusedParams& p, const TeamSpace& space, int num_pages,
                                                    int kept, int rank, int size_log2, FusedShared& shared,
                                                    int32_t* list) {
    BlockSelect<kTeamThreads> select{shared.select};
    // Sink pages, the best of those between, recent pages.
    const int first = p.sink_pages, last = num_pages - p.recent_pages, competing = last - first,
              wanted = kept - p.sink_pages - p.recent_pages;
    // Thread i looks at pages [i * run, (i + 1) * run); each warp also at a sample of all.
    const int run = (num_pages + 4 * kTeamThreads - 1) / (4 * kTeamThreads) * 4, mine = threadIdx.x * run;
    const int sample = (first + threadIdx.x % kWarp * (competing / kWarp)) / 4 * 4;
    auto deal = [&](int position, int page) {
        if ((position & ((1 << size_log2) - 1)) == rank) list[position >> size_log2] = page;
    };
    for (int i = threadIdx.x; i < p.sink_pages; i += kTeamThreads) deal(i, i);
    for (int i = threadIdx.x; i < p.recent_pages; i += kTeamThreads) deal(kept - p.recent_pages + i, last + i);
    // Where blocks finish far apart, each warp waits for the blocks' flags, a few words: polling all keys meanwhile
    // would fill the L2's bandwidth. Teams of blocks that have the chip to themselves finish together and save the
    // round trip.
    const int lane = threadIdx.x % kWarp, size = 1 << size_log2;
    if (size < kMaxTeam)
        while (__any_sync(kAllLanes, lane < size && peek_word(space.done + lane) == 0)) {
        }
    uint32_t key[kKeys] = {}, sampled;
    bool pending;
    do {  // all loads, then the tests: polling one by one would serialise the round trips
        const uint4 s = peek(space.keys + sample);
#pragma unroll
        for (int j = 0; j < kKeys; j += 4) {
            uint4 v{key[j], key[j + 1], key[j + 2], key[j + 3]};
            if (j < run && mine + j < num_pages && !complete(v)) v = peek(space.keys + mine + j);
            key[j] = v.x, key[j + 1] = v.y, key[j + 2] = v.z, key[j + 3] = v.w;
        }
        sampled = max(max(s.x, s.y), max(s.z, s.w));
        pending = !complete(s) && sample + 3 < num_pages;
#pragma unroll
        for (int j = 0; j < kKeys; ++j) pending |= j < run && mine + j < num_pages && key[j] == 0;
    } while (pending);
    mark_phase(3);

    if (wanted == 0) return;
#pragma unroll
    for (int j = 0; j < kKeys; ++j)
        if (mine + j < first || mine + j >= last) key[j] = 0;  // takes no part
    uint32_t ties;
    const uint32_t threshold = select.threshold(
        [&](auto&& f) {
#pragma unroll
            for (int j = 0; j < kKeys; ++j)
                if (key[j] != 0) f(key[j]);
        },
        sampled, wanted, competing, &ties);
    mark_phase(4);
    uint32_t is_above = 0, is_tie = 0, total;  // a bit a key
#pragma unroll
    for (int j = 0; j < kKeys; ++j)
        is_above |= (key[j] > threshold ? 1u : 0u) << j, is_tie |= (key[j] == threshold ? 1u : 0u) << j;
    const uint32_t before = select.exclusive_sum(__popc(is_above) + (__popc(is_tie) << 16), &total);
    uint32_t above = before & 0xffff, equal = before >> 16;
    for (uint32_t left = is_above | is_tie; left != 0; left &= left - 1) {
        const int j = __ffs(left) - 1;
        if (is_tie >> j & 1) {
            if (equal++ >= ties) continue;
            deal(p.sink_pages + above + equal - 1, mine + j);
        } else {
            deal(p.sink_pages + above++ + min(equal, ties), mine + j);
        }
    }
}

template <class T, int D, int kKeys>
__global__ void __launch_bounds__(kTeamThreads, D <= 128 ? 2 : 1)
    quest_decode_attention_kernel(const FusedParams p, const FusedPlan plan, uint32_t* workspace) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(16) float warp_out[];  // [warps, group, D], then this block's pages
    __shared__ FusedShared shared;
    const AttentionParams& a = p.attention;
    const int size = gridDim.x, size_log2 = plan.team_log2, rank = blockIdx.x, kv_head = blockIdx.y, row = blockIdx.z;
    const int team = row * a.num_kv_heads + kv_head, group = plan.group;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
    int32_t* list = reinterpret_cast<int32_t*>(warp_out + kTeamWarps * group * D);
    const PageTable table(a.paging, a.rows_per_request == 1 ? row : row / a.rows_per_request);
    const TeamSpace space(workspace, team, size, group, D, table.max_pages);
    mark_phase(0);
    let_successor_start();
    BlockSelect<kTeamThreads>{shared.select}.clear_bins();
    prefetch_bounds<T, D>(p, table, row, kv_head, (warp * size + rank) * kTileTokens);
    wait_for_predecessor();
    mark_phase(1);

    table.prefetch();
    // Block numbers are fetched beside the length that says whether they count.
    int first = (warp * size + rank) * kTileTokens;
    auto block_of = [&](int page) { return page < table.max_pages ? table.block(page) : 0; };
    int blocks[2] = {block_of(first + g), block_of(first + g + 8)};
    uint4 query[D / 32];
    load_query<T, D>(
        query,
        row_of<T>(a.query, row, kv_head * group + min(g, group - 1)));  // columns past the group repeat its last head
    int budget = p.page_budget;
    if (p.page_budgets)
        budget = min(max(p.page_budgets[p.budget_heads == 1 ? row : team], p.sink_pages + p.recent_pages), budget);
    const int tokens = table.visible(a.seq_lens[row]), num_pages = table.pages(tokens);
    const int kept = min(budget, num_pages);
    const bool selects = kept < num_pages;

    // Score: tiles of 16 pages, dealt to the team's blocks one by one.
    const int step = kTeamWarps * size * kTileTokens;
    if (selects) {
        const T* metadata = static_cast<const T*>(p.metadata.data) + kv_head * p.metadata.head_stride;
        uint32_t best_key = 0;
        int best_page = 0;
        for (; first < num_pages; first += step) {
            const int page0 = first + g, page1 = page0 + 8;
            const PagePlace places[2] = {{page0 < num_pages ? blocks[0] : 0, table.part(page0)},
                                         {page1 < num_pages ? blocks[1] : 0, table.part(page1)}};
            PageTile<T, D> tile;
            tile.load(metadata, p.metadata.block_stride, places);
            blocks[0] = block_of(first + step + g), blocks[1] = block_of(first + step + g + 8);
            float c[4];
            tile.multiply(c, query);
            HeadReducer reducer;
            reducer.include(c, 0, group);
            const bool use_max = p.head_reduction == HeadReduction::kMax;
            const float scores[2] = {reducer.score(0, use_max, group), reducer.score(1, use_max, group)};
            const int page = first + g + 8 * t;
            if (t >= 2 || page >= num_pages) continue;
            const uint32_t key = sort_key(t == 0 ? scores[0] : scores[1]);
            publish(space.keys + page, key);
            if (key > best_key) best_key = key, best_page = page;
        }
        // Where memory is the limit, a warp's best page, likely to be chosen, is fetched while the blocks exchange
        // keys.
        if (size < kMaxTeam) prefetch_page<T, D>(a, table, kv_head, best_key, best_page);
        mark_phase(2);
        __syncthreads();  // all of the block's keys are on their way; bins are clear
        if (threadIdx.x == 0 && size < kMaxTeam) publish(space.done + rank, 1u);
        deal_selected_pages<kKeys>(p, space, num_pages, kept, rank, size_log2, shared, list);
        __syncthreads();
    }

    // Attend: pages rank, rank + size, ... of the selection, 16 tokens a warp at a time.
    mark_phase(5);
    const int page_shift = table.page_shift, num_mine = (kept - rank + size - 1) >> size_log2;
    const float scale = a.sm_scale * kLog2E;
    auto run_of = [&](int tile, int half_tile) -> Run {
        const int at = tile * kTileTokens + 8 * half_tile, index = at >> page_shift,
                  within = at & ((1 << page_shift) - 1);
        if (index >= num_mine) return {0, 0, 0};
        const int page = selects ? list[index] : (index << size_log2) + rank;
        return {table.block(page), (table.part(page) << page_shift) + within,
                min(tokens - (page << page_shift) - within, 8)};
    };
    const T* keys = static_cast<const T*>(a.k_cache.data) + kv_head * a.k_cache.head_stride;
    const T* values = static_cast<const T*>(a.v_cache.data) + kv_head * a.v_cache.head_stride;
    OnlineSoftmax<T, D> softmax;
    const int num_tiles = ((num_mine << page_shift) + kTileTokens - 1) / kTileTokens;
    for (int tile = warp; tile < num_tiles; tile += kTeamWarps) {
        const Run runs[2] = {run_of(tile, 0), run_of(tile, 1)};
        TokenTile<T, D> tile_tokens;
        tile_tokens.load_keys(a.k_cache, keys, runs);
        if constexpr (D <= 128) tile_tokens.load_values(a.v_cache, values, runs);
        float score[4];
        softmax.scores_of(score, tile_tokens, query, scale);
        if constexpr (D > 128) tile_tokens.load_values(a.v_cache, values, runs);
        softmax.add(score, tile_tokens);
    }

    // Merge: the block's warps through shared memory, then each block every size-th chunk of four channels of the
    // team's outputs.
    mark_phase(6);
    WarpPartials<D, kTeamWarps> partials{shared.top, shared.sum, warp_out, group};
    partials.store(softmax, warp);
    __syncthreads();
    const int chunks = group * D / 4 >> size_log2;  // of a reader
    for (int chunk = threadIdx.x; chunk < group * D / 4; chunk += kTeamThreads) {
        float top, total;
        const float4 o = partials.add_up(chunk * 4 / D, chunk * 4 % D, &top, &total);
        uint32_t* to =
            space.parts + (((((chunk & (size - 1)) << size_log2) + rank) * chunks + (chunk >> size_log2)) << 3);
        publish(to, uint4{nonzero_bits(o.x), nonzero_bits(o.y), nonzero_bits(o.z), nonzero_bits(o.w)});
        publish(to + 4, uint4{nonzero_bits(top), nonzero_bits(total), 1, 1});
    }
    mark_phase(7);
    // A lane takes one block's part of one chunk; the lanes of a chunk are neighbours.
    for (int base = warp * kWarp; base < group * D / 4; base += kTeamThreads) {
        const int item = base + lane, writer = item & (size - 1), chunk = item >> size_log2;
        uint4 v{}, w{};
        if (item < group * D / 4) {
            uint32_t* from = space.parts + ((((rank << size_log2) + writer) * chunks + chunk) << 3);
            do v = peek(from), w = peek(from + 4);
            while (!complete(v) || !complete(w));
            publish(from, uint4{}), publish(from + 4, uint4{});
        }
        float4 o{__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
        const float part_top = __uint_as_float(w.x);
        float top = part_top, total = __uint_as_float(w.y);
        for (int other = 1; other < size; other *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, other));
        const float weight = part_top == -INFINITY ? 1.f : exp2f(part_top - top);  // no tokens: zeros, or NaN
        total *= weight, o.x *= weight, o.y *= weight, o.z *= weight, o.w *= weight;
        for (int other = 1; other < size; other *= 2) {
            total += __shfl_xor_sync(kAllLanes, total, other);
            o.x += __shfl_xor_sync(kAllLanes, o.x, other), o.y += __shfl_xor_sync(kAllLanes, o.y, other);
            o.z += __shfl_xor_sync(kAllLanes, o.z, other), o.w += __shfl_xor_sync(kAllLanes, o.w, other);
        }
        if (writer != 0 || item >= group * D / 4) continue;
        const int place = ((chunk << size_log2) + rank) * 4, head = kv_head * group + place / D;
        const float inverse = total == 0.f ? 0.f : 1.f / total;
        store_four<T>(const_cast<T*>(row_of<T>(a.out, row, head)) + place % D,
                      float4{o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse});
        if (place % D == 0)
            a.lse[int64_t(row) * a.num_q_heads + head] = total == 0.f ? -INFINITY : (top + log2f(total)) * kLn2;
    }
    mark_phase(8);
    // The first warp has seen a part of every block, so all have read the keys.
    if (!selects || warp != 0) return;
    if (lane == 0) publish(space.done + rank, 0u);
    for (int page = (rank + lane / kTileTokens * size) * kTileTokens + lane % kTileTokens; page < num_pages;
         page += 2 * size * kTileTokens)
        publish(space.keys + page, 0u);
    mark_phase(9);
#endif
}

}  // namespace quest::cuda
