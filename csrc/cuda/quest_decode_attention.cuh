// Score, select, attend and merge in one launch (sm_90 and later).
// Grid: a team of blocks for each (row, KV head), blocks team * size + rank, all of them resident. Each block scores its tiles of pages and
// publishes their keys; each finds the same selection from all keys; the chosen pages are dealt out evenly; each block merges a slice of
// the output. Blocks exchange words through L2, and a word is its own flag: 0 means not written yet. Every word that was written is zero
// again when the launch ends, so a workspace that starts as zeros serves any number of launches.
// Bound by reading the metadata and the chosen K and V, and by the latency of two exchanges.
#pragma once
#include "attend_tile.cuh"
#include "launch.h"
#include "score_tile.cuh"
#include "topk_threshold.cuh"

namespace quest::cuda {

constexpr int kTeamThreads = 256, kTeamWarps = kTeamThreads / kWarp;

__device__ __forceinline__ void publish(uint32_t* to, uint32_t x) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory"); }
__device__ __forceinline__ void publish(uint32_t* to, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ uint4 peek(const uint32_t* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
// A float as a word that is never 0.
__device__ __forceinline__ uint32_t nonzero_bits(float x) { return x == 0.f ? 0x80000000u : __float_as_uint(x); }
__device__ __forceinline__ bool complete(const uint4& v) { return v.x != 0 && v.y != 0 && v.z != 0 && v.w != 0; }

// A team's part of the workspace, in words.
struct TeamSpace {
    uint32_t* keys;      // [P, to a multiple of 4]: sort keys of all pages
    uint32_t* partials;  // [reader, writer, slice]: each block's slice of each block's unnormalised output
    uint32_t* weights;   // [reader, writer, group, 2]: base-2 maximum and sum of weights, a copy for each reader

    __device__ TeamSpace(uint32_t* workspace, int team, int size, int group, int head_dim, int max_pages) {
        uint32_t* start = workspace + team * fused_team_words(size, group, head_dim, max_pages);
        keys = start;
        partials = keys + fused_key_words(max_pages);
        weights = partials + size * group * head_dim;
    }
};

struct FusedShared {
    BlockSelect<kTeamThreads>::Shared select;
    float top[kTeamWarps][kGroupHeads], sum[kTeamWarps][kGroupHeads];
    float weights[kMaxTeam][kGroupHeads][2];
};

// Finds the selection from the team's published keys and lists the pages that are dealt to this block, in order.
template <int kKeys>
__device__ __forceinline__ void deal_selected_pages(const FusedParams& p, const uint32_t* keys, int num_pages, int kept, int rank, int size,
                                                    FusedShared& shared, int32_t* list) {
    // Thread i looks at pages [i * run, (i + 1) * run).
    const int run = (num_pages + 4 * kTeamThreads - 1) / (4 * kTeamThreads) * 4, mine = threadIdx.x * run;
    uint32_t key[kKeys];
    bool pending;
    do {  // all loads, then the tests: polling one by one would serialise the round trips
        pending = false;
#pragma unroll
        for (int j = 0; j < kKeys; j += 4) {
            if (j >= run || mine + j >= num_pages) {
                key[j] = key[j + 1] = key[j + 2] = key[j + 3] = 0;
                continue;
            }
            const uint4 v = peek(keys + mine + j);
            key[j] = v.x, key[j + 1] = v.y, key[j + 2] = v.z, key[j + 3] = v.w;
        }
#pragma unroll
        for (int j = 0; j < kKeys; ++j) pending |= j < run && mine + j < num_pages && key[j] == 0;
    } while (pending);

    // Sink pages, the best of those between, recent pages. A key of 0 takes no part.
    const int first = p.sink_pages, last = num_pages - p.recent_pages, wanted = kept - p.sink_pages - p.recent_pages;
#pragma unroll
    for (int j = 0; j < kKeys; ++j)
        if (mine + j < first || mine + j >= last) key[j] = 0;
    auto deal = [&](int position, int page) {
        if (position % size == rank) list[position / size] = page;
    };
    for (int i = threadIdx.x; i < p.sink_pages; i += kTeamThreads) deal(i, i);
    for (int i = threadIdx.x; i < p.recent_pages; i += kTeamThreads) deal(kept - p.recent_pages + i, last + i);
    if (wanted == 0) return;

    BlockSelect<kTeamThreads> select{shared.select};
    uint32_t ties;
    const uint32_t threshold = select.threshold(
        [&](auto&& f) {
#pragma unroll
            for (int j = 0; j < kKeys; ++j)
                if (key[j] != 0) f(key[j]);
        },
        wanted, &ties);
    uint32_t packed = 0, total;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) packed += (key[j] > threshold ? 1u : 0u) + (key[j] == threshold ? 0x10000u : 0u);
    const uint32_t before = select.exclusive_sum(packed, &total);
    uint32_t above = before & 0xffff, equal = before >> 16;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
        const bool is_above = key[j] > threshold, is_tie = key[j] == threshold;
        if (is_above || (is_tie && equal < ties)) deal(p.sink_pages + above + min(equal, ties), mine + j);
        above += is_above, equal += is_tie;
    }
}

template <class T, int D, int kKeys, int kResident>
__global__ void __launch_bounds__(kTeamThreads, kResident) quest_decode_attention_kernel(const FusedParams p, const FusedPlan plan, uint32_t* workspace) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(16) char dynamic[];
    __shared__ FusedShared shared;
    const AttentionParams& a = p.attention;
    const int size = plan.team_size, rank = blockIdx.x % size, team = blockIdx.x / size, row = team / a.num_kv_heads, kv_head = team % a.num_kv_heads;
    const int group = a.num_q_heads / a.num_kv_heads, max_pages = a.paging.max_blocks * a.paging.pages_per_block;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
    float* out = reinterpret_cast<float*>(dynamic);                                            // [warps, group, D]
    int32_t* list = reinterpret_cast<int32_t*>(out + kTeamWarps * group * D);                  // this block's pages
    const TeamSpace space(workspace, team, size, group, D, max_pages);
    const int32_t* table = a.paging.block_table + row / a.rows_per_request * a.paging.table_stride;
    const T* group_query = row_of<T>(a.query, row, kv_head * group);
    let_successor_start();
    BlockSelect<kTeamThreads>{shared.select}.clear_bins();
    wait_for_predecessor();

    const int tokens = visible_tokens(a.seq_lens[row], a.paging), num_pages = (tokens + a.paging.page_size - 1) / a.paging.page_size;
    int budget = p.page_budget;
    if (p.page_budgets)
        budget = min(max(p.page_budgets[p.budget_heads == 1 ? row : team], p.sink_pages + p.recent_pages), p.page_budget);
    const int kept = min(budget, num_pages);
    const bool selects = kept < num_pages;

    // Score: tile i of 16 pages belongs to block i % size of the team.
    auto for_own_tiles = [&](auto&& f) {
        for (int tile = warp * size + rank; tile * kTileTokens < num_pages; tile += kTeamWarps * size) f(tile * kTileTokens);
    };
    if (selects) {
        const T* metadata = static_cast<const T*>(p.metadata.data) + kv_head * p.metadata.head_stride;
        for_own_tiles([&](int first) {
            PageTile<T, D> tile;
            tile.load(metadata, p.metadata.block_stride, table, a.paging.pages_per_block, first, num_pages);
            float scores[2];
            score_tile(tile, group_query, a.query.head_stride, group, p.head_reduction == HeadReduction::kMax, scores, [](int, int, float) {});
            const int page = first + g + 8 * t;
            if (t < 2 && page < num_pages) publish(space.keys + page, sort_key(t == 0 ? scores[0] : scores[1]));
        });
        __syncthreads();  // bins are clear
        deal_selected_pages<kKeys>(p, space.keys, num_pages, kept, rank, size, shared, list);
        __syncthreads();
    }

    // Attend: pages rank, rank + size, ... of the selection, 16 tokens a warp at a time.
    const int page_shift = 31 - __clz(a.paging.page_size), num_mine = (kept - rank + size - 1) / size;
    const float scale = a.sm_scale * kLog2E;
    auto run_of = [&](int tile, int half_tile) -> Run {
        const int at = tile * kTileTokens + 8 * half_tile, index = at >> page_shift, within = at & ((1 << page_shift) - 1);
        if (index >= num_mine) return {0, 0, 0};
        const int page = selects ? list[index] : index * size + rank;
        return {table[page / a.paging.pages_per_block], ((page % a.paging.pages_per_block) << page_shift) + within,
                min(tokens - (page << page_shift) - within, 8)};
    };
    uint4 query[D / 32];
#pragma unroll
    for (int c = 0; c < D / 32; ++c)
        query[c] = *reinterpret_cast<const uint4*>(group_query + min(g, group - 1) * a.query.head_stride + 32 * c + 8 * t);
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

    // Merge: first the block's warps, then each block a slice of the team's outputs.
    WarpPartials<D, kTeamWarps> partials{shared.top, shared.sum, out, group};
    partials.store(softmax, warp);
    __syncthreads();
    const int slice = group * D / size;  // at least 4 channels of one head, or whole heads
    for (int at = threadIdx.x * 4; at < group * D; at += kTeamThreads * 4) {
        const int head = at / D;
        float top, total;
        const float4 o = partials.add_up(head, at % D, &top, &total);
        publish(space.partials + (at / slice * size + rank) * slice + at % slice,
                uint4{nonzero_bits(o.x), nonzero_bits(o.y), nonzero_bits(o.z), nonzero_bits(o.w)});
        if (at % D != 0) continue;
        for (int reader = 0; reader < size; ++reader) {
            uint32_t* to = space.weights + ((reader * size + rank) * group + head) * 2;
            publish(to, nonzero_bits(top)), publish(to + 1, nonzero_bits(total));
        }
    }
    __syncthreads();  // `out` is free for the team's partial outputs: [writer, slice]
    const uint32_t *my_partials = space.partials + rank * size * slice, *my_weights = space.weights + rank * size * group * 2;
    const int weight_words = size * group * 2;
    const uint4 zeros{};
    for (int at = threadIdx.x * 4; at < size * slice; at += kTeamThreads * 4) {
        uint4 v;
        do v = peek(my_partials + at);
        while (!complete(v));
        *reinterpret_cast<uint4*>(out + at) = v;
        publish(const_cast<uint32_t*>(my_partials) + at, zeros);
    }
    for (int at = threadIdx.x; at < weight_words; at += kTeamThreads) {
        uint32_t x;
        do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(my_weights + at) : "memory");
        while (x == 0);
        shared.weights[at / (2 * group)][at / 2 % group][at % 2] = __uint_as_float(x);
        publish(const_cast<uint32_t*>(my_weights) + at, 0u);
    }
    __syncthreads();
    // Every block has published its part, so all have read the keys.
    if (selects) for_own_tiles([&](int first) {
        if (lane < kTileTokens && first + lane < num_pages) publish(space.keys + first + lane, 0u);
    });
    for (int at = threadIdx.x; at < slice; at += kTeamThreads) {
        const int place = rank * slice + at, head = place / D, channel = place % D;
        float top = -INFINITY, total = 0.f, o = 0.f;
        for (int w = 0; w < size; ++w) top = fmaxf(top, shared.weights[w][head][0]);
        for (int w = 0; w < size; ++w) {
            const float part_top = shared.weights[w][head][0], weight = part_top == -INFINITY ? 1.f : exp2f(part_top - top);
            total += weight * shared.weights[w][head][1];
            o += weight * out[w * slice + at];
        }
        const_cast<T*>(row_of<T>(a.out, row, kv_head * group + head))[channel] = Packed<T>::from_float(total == 0.f ? 0.f : o / total);
        if (channel == 0) a.lse[int64_t(row) * a.num_q_heads + kv_head * group + head] = total == 0.f ? -INFINITY : (top + log2f(total)) * kLn2;
    }
#endif
}

}  // namespace quest::cuda
