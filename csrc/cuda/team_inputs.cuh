// What a block of a team asks for first: the row's length, and the query as the products want it. Asking and taking are
// apart, so that other loads can be on their way in between.
#pragma once
#include "packed_tile.cuh"
#include "team.cuh"

namespace quest::cuda {

// How long a row is, how many pages that is, and how many of them it attends to.
struct RowLengths {
    int tokens, num_pages, kept;

    // Where a lane's word lies: a load that all lanes ask for alike goes to a uniform register and is waited for at
    // once.
    static __device__ __forceinline__ const int32_t* word_of(const FusedParams& p, int row, int team) {
        const int32_t* from = p.attention.seq_lens + row;
        if (threadIdx.x % kWarp == 1 && p.page_budgets) from = p.page_budgets + (p.budget_heads == 1 ? row : team);
        return from;
    }
    __device__ __forceinline__ void take(int asked, const FusedParams& p, const PageTable& table) {
        int budget = p.page_budget;
        if (p.page_budgets) budget = min(max(__shfl_sync(kAllLanes, asked, 1), p.sink_pages + p.recent_pages), budget);
        tokens = table.visible(__shfl_sync(kAllLanes, asked, 0));
        num_pages = table.pages(tokens);
        kept = min(budget, num_pages);
    }
};

// A group's query heads, in shared memory, as each lane of a warp wants them, whichever the warp: to attend, and to
// score by metadata of type M. The warps share the work, a chunk of 32 channels each.
template <class T, class M, int D>
struct SharedQuery {
    static constexpr bool kNarrow = std::is_same_v<M, __nv_fp8_e4m3>, kPacked = std::is_same_v<M, FourBits>;
    static_assert(D / 32 <= kTeamWarps);
    uint4 plain[D / 32][kWarp];
    uint4 hi[kNarrow || kPacked ? D / 32 : 1][kWarp], lo[kPacked ? D / 32 : 1][kWarp];  // in 8 bits hi is all of it
    float4 start[2][kPacked ? D / 32 : 1][4];

    struct Chunk {
        uint4 plain, narrow;
    };
    // Where this lane's chunk lies. head: the query head of its column.
    static __device__ __forceinline__ const T* chunk_of(const T* head) {
        return head + 32 * (threadIdx.x / kWarp) + threadIdx.x % 4 * 8;
    }
    static __device__ __forceinline__ Chunk ask(const T* from) {
        const int warp = threadIdx.x / kWarp;
        Chunk chunk{};
        if (warp < D / 32) {
            chunk.plain = *reinterpret_cast<const uint4*>(from);
            if constexpr (kNarrow)
                chunk.narrow = *reinterpret_cast<const uint4*>(from - 32 * warp - threadIdx.x % 4 * 8 +
                                                               PageTile<T, M, D>::channel(warp));
        }
        return chunk;
    }
    __device__ __forceinline__ void keep(const Chunk& chunk, bool points) {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        if (warp >= D / 32) return;
        plain[warp][lane] = chunk.plain;
        if constexpr (kNarrow) hi[warp][lane] = chunk.narrow;
        if constexpr (kPacked) {
            const PackedQuery q = PageTile<T, M, D>::prepare(chunk.plain, QueryParts<T>(points));
            hi[warp][lane] = q.hi, lo[warp][lane] = q.lo;
            if (lane < 4) start[0][warp][lane] = q.hi_start, start[1][warp][lane] = q.lo_start;
        }
    }
    __device__ __forceinline__ uint4 to_attend(int chunk) const { return plain[chunk][threadIdx.x % kWarp]; }
    __device__ __forceinline__ auto to_score(int chunk) const {
        const int lane = threadIdx.x % kWarp;
        if constexpr (kPacked) {
            return PackedQuery{hi[chunk][lane], lo[chunk][lane], start[0][chunk][lane % 4], start[1][chunk][lane % 4]};
        } else {
            return kNarrow ? hi[chunk][lane] : plain[chunk][lane];
        }
    }
};

}  // namespace quest::cuda
