// Decode attention over the listed pages of a row, or over all of them.
// Grid (splits, groups of at most 8 query heads that share pages and a KV head, R), 16 tokens a warp at a time.
// Shared memory: a group x D partial result for each of the block's warps. Bound by reading K and V of the attended
// pages.
#pragma once
#include "attend_tile.cuh"
#include "launch.h"

namespace quest::cuda {

// The tokens a row attends to: its listed pages, then the last page where the list lacks it; every page where there is
// no list. Reads in three rounds, each in flight together: list entries beside lengths and counts, then block numbers,
// then keys and values.
struct TokenList {
    const int32_t* ids;  // null: every page
    const PageTable table;
    int max_ids;
    int tokens, last_page, count, num_pages;

    __device__ TokenList(const AttentionParams& p, int row, int id_head)
        : ids(p.page_ids ? p.page_ids + (int64_t(row) * p.id_heads + id_head) * p.max_ids : nullptr),
          table(p.paging, row / p.rows_per_request),
          max_ids(p.max_ids) {}

    // The list's entry for half a tile, from token `inner` of it on, before it is known how long the list is.
    __device__ int entry(int tile, int half_tile, int inner) const {
        const int index = (tile * kTileTokens + 8 * half_tile + inner) >> table.page_shift;
        return ids ? ids[min(index, max_ids - 1)] : index;
    }

    __device__ void read_lengths(const AttentionParams& p, int row, int id_head) {
        const int counted = ids && p.page_counts ? p.page_counts[int64_t(row) * p.id_heads + id_head] : 0;
        tokens = table.visible(p.seq_lens[row]);
        num_pages = count = table.pages(tokens);
        last_page = num_pages - 1;
        if (ids == nullptr || tokens == 0) return;
        count = p.page_counts ? min(max(counted, 0), max_ids) : position_of(max_ids, [&](int id) { return id < 0; });
        const int newest = count > 0 ? ids[count - 1] : -1;
        bool lists_last = newest == last_page;
        if (newest > last_page) {  // selected before a rollback: the list ends at the last page that is left
            const int end = position_of(count, [&](int id) { return id >= last_page; });
            lists_last = ids[end] == last_page;
            count = end + lists_last;
        }
        num_pages = count + !lists_last;
    }

    // The first position in [0, end) of which `reached` holds, given that it holds from there on; `end` where there is
    // none.
    template <class F>
    __device__ int position_of(int end, F reached) const {
        int low = 0;
        while (low < end) {
            const int middle = (low + end) / 2;
            if (reached(ids[middle]))
                end = middle;
            else
                low = middle + 1;
        }
        return low;
    }

    __device__ int num_tiles() const { return ((num_pages << table.page_shift) + kTileTokens - 1) / kTileTokens; }

    __device__ Run run(int tile, int half_tile, int inner, int entry) const {
        const int slot = tile * kTileTokens + 8 * half_tile + inner, index = slot >> table.page_shift,
                  page = index < count ? entry : last_page;
        if (index >= num_pages || page < 0 || page > last_page) return {0, 0, 0};
        const int within = slot & ((1 << table.page_shift) - 1);
        return {table.block(page), (table.part(page) << table.page_shift) + within - inner,
                inner + min(tokens - (page << table.page_shift) - within, 8 - inner)};
    }
};

// Whether query heads select pages of their own; else those of a KV head go together.
__host__ __device__ inline bool selects_by_query_head(const AttentionParams& p) {
    return p.page_ids && p.id_heads == p.num_q_heads;
}

// How many groups of query heads there are, and which heads group `index` has.
__host__ __device__ inline int groups_per_kv_head(const AttentionParams& p) {
    const int heads = p.num_q_heads / p.num_kv_heads;
    return selects_by_query_head(p) ? heads : (heads + kGroupHeads - 1) / kGroupHeads;
}
struct GroupedHeads {
    int kv_head, first, count;

    __device__ GroupedHeads(const AttentionParams& p, int index) {
        const int heads = p.num_q_heads / p.num_kv_heads, groups = groups_per_kv_head(p),
                  most = (heads + groups - 1) / groups;
        kv_head = index / groups;
        const int before = index % groups * most;
        first = kv_head * heads + before;
        count = min(most, heads - before);
    }
};

template <class T, int D>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, D <= 128 ? 3 : 2)
    sparse_decode_attention_kernel(const AttentionParams p, const AttentionScratch scratch) {
    extern __shared__ __align__(16) float partial_out[];  // [warps, head_offset(group)]
    __shared__ WarpSums<kWarpsPerBlock> sums;
    let_successor_start();
    wait_for_predecessor();

    const int row = blockIdx.z, split = blockIdx.x;
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
    const GroupedHeads heads(p, blockIdx.y);
    const int first_head = heads.first, group = heads.count;
    const int id_head = p.id_heads == 1 ? 0 : p.id_heads == p.num_kv_heads ? heads.kv_head : first_head;
    const int stride = gridDim.x * kWarpsPerBlock;
    int tile = split * kWarpsPerBlock + warp;
    TokenList list(p, row, id_head);
    // Of a lane's keys, then of its values: of pages of 4 these lie in others.
    const int inner[2] = {page_in_run(list.table.page_shift, g),
                          page_in_run(list.table.page_shift, threadIdx.x % 4 * 2)};
    int entries[2][2];
    auto ask = [&](int tile) {
#pragma unroll
        for (int of = 0; of < 2; ++of)
#pragma unroll
            for (int half_tile = 0; half_tile < 2; ++half_tile)
                entries[of][half_tile] = list.entry(tile, half_tile, inner[of]);
    };
    ask(tile);
    list.read_lengths(p, row, id_head);
    const int num_tiles = list.num_tiles();
    const float scale = p.sm_scale * kLog2E;  // scores in base 2

    uint4 query[D / 32];
    load_query<T, D>(
        query, row_of<T>(p.query, row, first_head + min(g, group - 1)));  // columns past the group repeat its last head
    const HeadRows<T> keys = TokenTile<T, D>::keys_of(p, heads.kv_head),
                      values = TokenTile<T, D>::values_of(p, heads.kv_head);

    OnlineSoftmax<T, D> softmax;
    Run runs[2][2];
    auto find = [&](int tile) {
#pragma unroll
        for (int of = 0; of < 2; ++of)
#pragma unroll
            for (int half_tile = 0; half_tile < 2; ++half_tile)
                runs[of][half_tile] = list.run(tile, half_tile, inner[of], entries[of][half_tile]);
    };
    find(tile);
    for (; tile < num_tiles; tile += stride) {
        const int next = tile + stride;
        ask(next);
        TokenTile<T, D> tokens;
        tokens.load_keys(keys, runs[0]);
        if constexpr (D <= 128)
            tokens.load_values(values, runs[1]);  // in flight beside the keys, where registers hold both
        float score[4];
        softmax.scores_of(score, tokens, [&](int c) { return query[c]; }, scale);
        if constexpr (D > 128) tokens.load_values(values, runs[1]);
        find(next);
        softmax.add(score, tokens);
    }

    WarpPartials<D, kWarpsPerBlock> partials{sums, partial_out, group};
    partials.store(softmax, warp);
    __syncthreads();
    for (int at = threadIdx.x * 4; at < group * D; at += kWarp * kWarpsPerBlock * 4) {
        const int head = at / D, channel = at % D;
        float top, total;
        const float4 o = partials.add_up(head, channel, &top, &total);
        const float inverse = total == 0.f ? 0.f : 1.f / total, lse2 = total == 0.f ? -INFINITY : top + log2f(total);
        const float4 mean{o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse};
        const int64_t item = int64_t(row) * p.num_q_heads + first_head + head;
        if (gridDim.x == 1) {
            store_four<T>(const_cast<T*>(row_of<T>(p.out, row, first_head + head)) + channel, mean);
            if (channel == 0) p.lse[item] = lse2 * kLn2;
        } else {
            const int64_t part = int64_t(split) * p.num_rows * p.num_q_heads + item;
            if (total != 0.f) *reinterpret_cast<float4*>(scratch.out + part * D + channel) = mean;
            if (channel == 0) scratch.lse[part] = lse2;
        }
    }
}

// out = sum of 2^lse_s out_s / sum of 2^lse_s over the splits s. Grid (Hq, R); each warp sums every fourth split, then
// the warps are summed.
template <class T, int D>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    merge_splits_kernel(const AttentionParams p, const AttentionScratch scratch) {
    constexpr int kChannels = D / kWarp;
    struct alignas(kChannels * sizeof(float)) Channels {
        float values[kChannels];
    };
    __shared__ float partial[kWarpsPerBlock][D];
    let_successor_start();
    wait_for_predecessor();

    const int head = blockIdx.x, row = blockIdx.y, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t item = int64_t(row) * p.num_q_heads + head, stride = int64_t(p.num_rows) * p.num_q_heads;
    float lse[kMaxSplits / kWarp], top = -INFINITY, total = 0.f;
#pragma unroll
    for (int i = 0; i < kMaxSplits / kWarp; ++i) {
        const int split = i * kWarp + lane;
        lse[i] = split < scratch.num_splits ? scratch.lse[split * stride + item] : -INFINITY;
        top = max_keep_nan(top, lse[i]);
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) top = max_keep_nan(top, __shfl_xor_sync(kAllLanes, top, step));
    float sums[kChannels] = {};
#pragma unroll
    for (int i = 0; i < kMaxSplits / kWarp; ++i) {
        const float weight = top == -INFINITY ? 0.f : exp2_fast(lse[i] - top);
        total += weight;
#pragma unroll
        for (int j = 0; j < kWarp / kWarpsPerBlock; ++j) {  // eight loads in flight
            const int split = i * kWarp + j * kWarpsPerBlock + warp;
            const float w = __shfl_sync(kAllLanes, weight, j * kWarpsPerBlock + warp);
            Channels part{};  // a split without tokens has weight 0 and wrote nothing
            if (w != 0.f)
                part = *reinterpret_cast<const Channels*>(scratch.out + (split * stride + item) * D + lane * kChannels);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) sums[c] += w * part.values[c];
        }
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) total += __shfl_xor_sync(kAllLanes, total, step);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) partial[warp][lane * kChannels + c] = sums[c];
    __syncthreads();
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    for (int channel = threadIdx.x * 4; channel < D; channel += kWarp * kWarpsPerBlock * 4) {
        float4 mean{0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int w = 0; w < kWarpsPerBlock; ++w) {
            const float4 o = *reinterpret_cast<const float4*>(&partial[w][channel]);
            mean.x += o.x * inverse, mean.y += o.y * inverse, mean.z += o.z * inverse, mean.w += o.w * inverse;
        }
        store_four<T>(const_cast<T*>(row_of<T>(p.out, row, head)) + channel, mean);
        if (channel == 0) p.lse[item] = total == 0.f ? -INFINITY : (top + log2f(total)) * kLn2;
    }
}

}  // namespace quest::cuda
