// How the blocks of a team meet: words through L2, a team's part of the workspace, and what is fetched ahead of its
// use.
#pragma once
#include "device.cuh"

namespace quest::cuda {

__device__ __forceinline__ void publish(uint32_t* to, uint32_t x) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ __forceinline__ void publish(uint32_t* to, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
__device__ __forceinline__ uint4 peek(const uint32_t* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint32_t peek_word(const uint32_t* from) {
    uint32_t x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}
__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
// A float as a word that is never 0.
__device__ __forceinline__ uint32_t nonzero_bits(float x) { return x == 0.f ? 0x80000000u : __float_as_uint(x); }
__device__ __forceinline__ bool complete(const uint4& v) { return v.x != 0 && v.y != 0 && v.z != 0 && v.w != 0; }

// A team's part of the workspace, in words.
struct TeamSpace {
    uint32_t* done;   // [writer]: all keys of a block are published, or soon will be seen
    uint32_t* keys;   // [P, to a multiple of 4]: sort keys of all pages
    uint32_t* parts;  // [reader, writer, chunks, 8]: 4 channels of a block's unnormalised output, their base-2 maximum
                      // and sum of weights

    __device__ TeamSpace(uint32_t* workspace, int team, int size, int group, int head_dim, int max_pages)
        : done(workspace + team * fused_team_words(size, group, head_dim, max_pages)),
          keys(done + kMaxTeam),
          parts(keys + fused_key_words(max_pages)) {}
};

// Where the time goes: in a build for that purpose, each block notes the clock as it passes from phase to phase.
#ifdef QUEST_PHASE_CLOCKS
constexpr int kPhases = 10, kMaxClockedBlocks = 512;
__device__ long long phase_clocks[kMaxClockedBlocks][kPhases];
__device__ __forceinline__ void mark_phase(int phase) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0 && block < kMaxClockedBlocks) phase_clocks[block][phase] = clock64();
}
#else
__device__ __forceinline__ void mark_phase(int) {}
#endif

// While the predecessor drains: brings a tile's bounds near, by lengths and block numbers that may be about to change.
template <class T, int D>
__device__ __forceinline__ void prefetch_bounds(const FusedParams& p, const PageTable& table, int row, int kv_head,
                                                int first) {
    const int lane = threadIdx.x % kWarp, page = first + lane / 2;
    const int tokens = table.visible(peek_word(reinterpret_cast<const uint32_t*>(p.attention.seq_lens + row)));
    if (page << table.page_shift >= tokens || table.pages(tokens) <= p.page_budget) return;
    const int block = peek_word(reinterpret_cast<const uint32_t*>(table.blocks + table.entry(page)));
    if (block < 0 || block >= p.num_blocks) return;
    const T* bounds = static_cast<const T*>(p.metadata.data) + block * p.metadata.block_stride +
                      kv_head * p.metadata.head_stride + table.part(page) * (2 * D) + lane % 2 * D;
#pragma unroll
    for (int c = 0; c < D; c += 64) prefetch(bounds + c);  // lines of 128 bytes
}

// Brings keys and values of the page of the largest key in the warp near, 16 tokens of them at most.
template <class T, int D>
__device__ __forceinline__ void prefetch_page(const AttentionParams& a, const PageTable& table, int kv_head,
                                              uint32_t key, int page) {
    const uint32_t best = __reduce_max_sync(kAllLanes, key);
    if (best == 0) return;
    page = __shfl_sync(kAllLanes, page, __ffs(__ballot_sync(kAllLanes, key == best)) - 1);
    const int lane = threadIdx.x % kWarp, token = lane % kTileTokens;
    if (token >> table.page_shift > 0) return;
    const Pool& pool = lane < kTileTokens ? a.k_cache : a.v_cache;
    const T* row = static_cast<const T*>(pool.data) + table.block(page) * pool.block_stride +
                   kv_head * pool.head_stride + ((table.part(page) << table.page_shift) + token) * pool.token_stride;
#pragma unroll
    for (int c = 0; c < D; c += 64) prefetch(row + c);  // lines of 128 bytes
}

}  // namespace quest::cuda
