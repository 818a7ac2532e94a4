// How the blocks of a team meet: words through L2, a team's part of the workspace, and what is fetched ahead of its
// use.
#pragma once
#include "device.cuh"

namespace quest::cuda {

constexpr int kTeamThreads = kTeamWarps * kWarp;

// Words stay in L2 while a decoder's weights pass through it: the next launch would wait for them to come back, 2 to 3
// us.
__device__ __forceinline__ uint64_t to_stay() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void publish(uint32_t* to, uint32_t x) {
    asm volatile("st.relaxed.gpu.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(to), "r"(x), "l"(to_stay()) : "memory");
}
__device__ __forceinline__ void publish(uint32_t* to, uint4 v) {
    asm volatile("st.relaxed.gpu.global.L2::cache_hint.v4.u32 [%0], {%1,%2,%3,%4}, %5;" ::"l"(to), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w), "l"(to_stay())
                 : "memory");
}
__device__ __forceinline__ void publish_pair(uint32_t* to, uint32_t x, uint32_t y) {
    asm volatile("st.relaxed.gpu.global.L2::cache_hint.v2.u32 [%0], {%1,%2}, %3;" ::"l"(to), "r"(x), "r"(y),
                 "l"(to_stay())
                 : "memory");
}
__device__ __forceinline__ bool complete(const uint4& v) { return v.x != 0 && v.y != 0 && v.z != 0 && v.w != 0; }
__device__ __forceinline__ uint4 peek(const uint32_t* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
// Where v is not complete yet. Polls of many words at once: no load waits for another's result.
__device__ __forceinline__ void peek_missing(uint4& v, const uint32_t* from) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(from), "r"(uint32_t(!complete(v)))
                 : "memory");
}
__device__ __forceinline__ uint32_t peek_word(const uint32_t* from) {
    uint32_t x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}
// A float as a word that is never 0.
__device__ __forceinline__ uint32_t nonzero_bits(float x) { return x == 0.f ? 0x80000000u : __float_as_uint(x); }

// Which block of which team this is: those of a team follow each other.
struct TeamPlace {
    unsigned team, rank, kv_head, row;

    static __device__ __forceinline__ TeamPlace of_block(unsigned block, int size_log2, unsigned num_kv_heads) {
        const unsigned team = block >> size_log2;
        return {team, block & ((1u << size_log2) - 1), team % num_kv_heads, team / num_kv_heads};
    }
};

// Which pages a warp of a team scores: tiles of 16, one after the other. One by one: neighbours, which are often chosen
// together, go to different warps, and in every round the warps' turn is another, lest pages at a regular distance meet
// in one warp.
template <bool kOneByOne>
struct PageDeal {
    static constexpr int kTurn = 37;
    int warp, num_warps;  // of the team; a power of two

    __device__ __forceinline__ int page(int tile, int row) const {
        if (!kOneByOne) return (tile * num_warps + warp) * kTileTokens + row;
        const int round = tile * kTileTokens + row;
        return round * num_warps + ((warp + round * kTurn) & (num_warps - 1));
    }
    // No page of this tile or a later one comes before.
    __device__ __forceinline__ int first(int tile) const {
        return kOneByOne ? tile * kTileTokens * num_warps : page(tile, 0);
    }
};

// A team's part of the workspace, in words.
struct TeamSpace {
    uint32_t* done;    // [writer]: all keys of a block are published, or soon will be seen
    uint32_t* parts;   // [reader, writer, chunks, 8]: 4 channels of a block's unnormalised output, their base-2 maximum
                       // and sum of weights
    uint32_t* bounds;  // [writer, warp]: of the keys that a warp does not list
    uint32_t* entries;  // [writer, warp, slots, 2]: shortlists
    uint32_t* keys;     // [P, to a multiple of 4]: sort keys of all pages

    __device__ TeamSpace(uint32_t* workspace, int team, int size, int group, int head_dim, int max_pages)
        : done(workspace + team * team_words(size, group, head_dim, max_pages)),
          parts(done + kMaxTeam),
          bounds(parts + 2 * size * group * head_dim),
          entries(bounds + kMaxTeam * kTeamWarps),
          keys(bounds + shortlist_words(max_pages)) {}
};

// By one warp of each block: the words that were written to find the selection are zero again. num_pages: 0 where no
// keys were published.
__device__ __forceinline__ void clear_exchange(const TeamSpace& space, int rank, int size_log2, int num_pages,
                                               bool lists) {
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) publish(space.done + rank, 0u);
#pragma unroll 1
    for (int page = (rank + (lane / kTileTokens << size_log2)) * kTileTokens + lane % kTileTokens; page < num_pages;
         page += 2 * kTileTokens << size_log2)
        publish(space.keys + page, 0u);
    if (!lists) return;
    if (lane < kTeamWarps) publish(space.bounds + rank * kTeamWarps + lane, 0u);
    const int words = 2 * kShortlistEntries >> size_log2;
#pragma unroll 1
    for (int i = lane * 4; i < words; i += kWarp * 4) publish(space.entries + rank * words + i, uint4{});
}

// Where the time goes: in a build for that purpose, each warp notes the clock as it passes from phase to phase.
#ifdef QUEST_PHASE_CLOCKS
constexpr int kPhases = 10, kMaxClockedBlocks = 264;
static __device__ unsigned phase_clocks[kMaxClockedBlocks][kTeamWarps][kPhases];
__device__ __forceinline__ void mark_phase(int phase) {
    if (threadIdx.x % kWarp != 0 || blockIdx.x >= kMaxClockedBlocks) return;
    unsigned now;
    asm volatile("mov.u32 %0, %clock;" : "=r"(now)::"memory");
    phase_clocks[blockIdx.x][threadIdx.x / kWarp][phase] = now;
}
// Each source file has clocks of its own, and a function that reads them.
#define QUEST_READ_PHASE_CLOCKS(name)                                                         \
    extern "C" __attribute__((visibility("default"))) int name(unsigned* clocks) {            \
        return cudaMemcpyFromSymbol(clocks, quest::cuda::phase_clocks, sizeof(phase_clocks)); \
    }
#else
#define QUEST_READ_PHASE_CLOCKS(name)
__device__ __forceinline__ void mark_phase(int) {}
#endif

// Brings keys and values of a page near, 16 tokens of them at most; called by a whole warp. The half of a warp that is
// for keys, or for values, may ask for two pages of 8.
template <class T, int D>
__device__ __forceinline__ void prefetch_page(const AttentionParams& a, const PageTable& table, int kv_head, int page,
                                              int block) {
    const int lane = threadIdx.x % kWarp, token = lane % kTileTokens & ((1 << table.page_shift) - 1);
    const Pool& pool = lane < kTileTokens ? a.k_cache : a.v_cache;
    const T* row = static_cast<const T*>(pool.data) + block * pool.block_stride + kv_head * pool.head_stride +
                   ((table.part(page) << table.page_shift) + token) * pool.token_stride;
#pragma unroll
    for (int c = 0; c < D; c += 64) prefetch(row + c);  // lines of 128 bytes
}

}  // namespace quest::cuda
