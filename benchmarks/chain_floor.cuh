// The kernel of chain_floor.cu.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../csrc/cuda/team.cuh"

using quest::cuda::complete, quest::cuda::let_successor_start, quest::cuda::peek, quest::cuda::wait_for_predecessor;

constexpr int kThreads = 256, kWarps = 8, kPageBytes = 4096, kMostWords = 2048;  // a page's keys of one head
constexpr unsigned kAll = 0xffffffffu;

enum Stage { kReads, kKeys, kParts };
enum Start { kAtOnce, kBoundsAsked, kKeysPublished, kPagesAsked };  // when the next launch may start

struct Params {
    const char *metadata, *cache;
    const int* table;  // [rows, pages]
    const uint4* query;
    uint32_t *workspace, *last_workspace;  // a launch clears the words of the one before
    uint2* out;
    int rows, heads, group, pages, kept, size_log2;
    uint32_t zero;  // unknown to the compiler
    Stage stage;
    Start start;
};

__device__ uint4 load(const char* from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}
__device__ void publish(uint32_t* to, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
__device__ void publish(uint32_t* to, uint32_t x) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ uint32_t fold(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

__host__ __device__ int team_words(int group, int size, int words) { return 32 + words + 256 * group * size; }

// kLoads: 16-byte loads of a lane for the metadata of 16 pages; 0: dense, K and V of all pages are read, a warp's first
// ones before the launch before has ended.
template <int kLoads>
__global__ void __launch_bounds__(kThreads, 2) chain(const __grid_constant__ Params p) {
    constexpr int kAhead = kLoads ? 16 / kLoads : 1, kHalf = kLoads ? kLoads / 2 : 1, kRow = 64 * kHalf;
    __shared__ uint32_t shared_sums[kThreads];
    const int size = 1 << p.size_log2, team = blockIdx.x >> p.size_log2, rank = blockIdx.x & (size - 1);
    const int head = team % p.heads, row = team / p.heads;
    if (row >= p.rows) {  // beside the teams: every SM has a block
        wait_for_predecessor();
        let_successor_start();
        return;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kWarps << p.size_log2;
    const int in_team = warp * size + rank, words = min(p.pages, kMostWords);
    const int* table = p.table + row * p.pages;
    const char* metadata = p.metadata + head * kRow;
    uint32_t* done = p.workspace + team * team_words(p.group, size, words);
    uint32_t* keys = done + 32;
    uint32_t* parts = keys + words;

    uint32_t sum = 0;
    uint4 bounds[kAhead][kLoads ? kLoads : 1], tokens[2][8];
    const int tiles = kLoads ? p.pages / 16 : 0;
    // A lane has a quarter of the 64-byte pieces of two pages of a tile, as an mma's operands.
    struct Pages {
        int block[2];
    };
    auto pages_of = [&](int tile) {
        const int* from = table + tile * 16 + lane / 4;
        return tile < tiles ? Pages{from[0], from[8]} : Pages{0, 0};
    };
    auto load_bounds = [&](int j, const Pages& pages) {
        const int half = j / kHalf, piece = j % kHalf;
        return load(metadata + int64_t(pages.block[half]) * p.heads * kRow + piece * 64 + lane % 4 * 16);
    };
    // K and V of pages in an order that the compiler cannot know before the words are there.
    const int num_mine = p.kept >> p.size_log2;
    int first = 0;
    auto page_of = [&](int i) {
        const int slot = ((i << p.size_log2) + rank + first) & (p.kept - 1);
        return int((slot * 2654435761u + team * 40503u) >> 7) & (p.pages / p.kept - 1) | slot * (p.pages / p.kept);
    };
    auto rows_of = [&](int i) {
        return p.cache + (int64_t(table[page_of(i)]) * 2 * p.heads + head) * kPageBytes + lane * 16;
    };
    auto load_first = [&] {
        if (warp >= num_mine) return;
        const char* from = rows_of(warp);
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int j = 0; j < 8; ++j) tokens[side][j] = load(from + side * p.heads * kPageBytes + 512 * j);
    };
    if (!kLoads) load_first();
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
        if (const int tile = in_team + i * warps; tile < tiles) {
            const Pages pages = pages_of(tile);
#pragma unroll
            for (int j = 0; j < kLoads; ++j) bounds[i][j] = load_bounds(j, pages);
        }
    wait_for_predecessor();
    if (p.start == kAtOnce) let_successor_start();
    sum ^= fold(load(reinterpret_cast<const char*>(p.query + team * p.group * 16 + lane % 16)));
    Pages next_pages = pages_of(in_team + kAhead * warps);
    for (int tile = in_team; tile < tiles;) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (tile >= tiles) break;
            const int next = tile + kAhead * warps;
            if (p.start == kBoundsAsked && next >= tiles) let_successor_start();
            const Pages pages = next_pages;
            next_pages = pages_of(next + warps);
#pragma unroll
            for (int j = 0; j < kLoads; ++j) {
                sum ^= fold(bounds[i][j]);
                if (next < tiles) bounds[i][j] = load_bounds(j, pages);
            }
            if (p.stage >= kKeys && p.pages <= kMostWords) {
                const uint32_t key = __reduce_xor_sync(kAll, sum) | 1;
                if (lane < 16) publish(keys + tile * 16 + lane, key);
            }
            tile += warps;
        }
    }
    if (kLoads && p.stage >= kKeys) {
        if (p.pages > kMostWords) {
            const int mine = words / warps;
            const uint32_t key = __reduce_xor_sync(kAll, sum) | 1;
            for (int i = lane; i < mine; i += 32) publish(keys + in_team * mine + i, key);
        }
        if (size < 16) {
            __syncthreads();
            if (threadIdx.x == 0) publish(done + rank, 1);
        }
        if (p.start == kKeysPublished) let_successor_start();
        if (size < 16) {
            uint32_t word = 1;
            do
                if (lane < size) asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(done + lane));
            while (__any_sync(kAll, word == 0));
        }
        uint4 a{1, 1, 1, 1}, b{1, 1, 1, 1};
        const int at = threadIdx.x * 4;
        do {
            if (at < words) a = peek(keys + at);
            if (at + 1024 < words) b = peek(keys + at + 1024);
        } while (!complete(a) || !complete(b));
        sum ^= fold(a) ^ fold(b);
        __syncthreads();  // all words were seen
    } else if (p.start == kKeysPublished) {
        let_successor_start();
    }

    // K and V.
    first = (sum ^ team * 977) & p.zero;
    if (kLoads) load_first();
    for (int i = warp; i < num_mine; i += kWarps) {
        const bool has_next = i + kWarps < num_mine;
        const char* from = has_next ? rows_of(i + kWarps) : nullptr;
        if (p.start == kPagesAsked && !has_next) let_successor_start();
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                sum ^= fold(tokens[side][j]);
                if (has_next) tokens[side][j] = load(from + side * p.heads * kPageBytes + 512 * j);
            }
    }
    shared_sums[threadIdx.x] = sum;
    __syncthreads();
    const int pieces = p.group * 32, chunks = pieces >> p.size_log2;
    for (int piece = threadIdx.x; piece < pieces; piece += kThreads) {
        uint32_t x = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) x ^= shared_sums[(piece + w * 32) % kThreads];
        uint2* out = p.out + team * pieces;
        if (p.stage < kParts) {
            if (rank == 0) out[piece] = {x, x};
            continue;
        }
        uint32_t* to = parts + ((((piece & (size - 1)) << p.size_log2) + rank) * chunks + (piece >> p.size_log2)) * 8;
        publish(to, {x | 1, x | 1, x | 1, x | 1}), publish(to + 4, {x | 1, x | 1, x | 1, x | 1});
    }
    if (p.stage == kParts)
        for (int item = threadIdx.x; item < pieces; item += kThreads) {
            const int writer = item & (size - 1), chunk = item >> p.size_log2;
            uint32_t* from = parts + (((rank << p.size_log2) + writer) * chunks + chunk) * 8;
            uint4 v, w;
            do {
                v = peek(from), w = peek(from + 4);
            } while (!complete(v) || !complete(w));
            uint32_t x = fold(v) ^ fold(w);
            for (int other = 1; other < size; other *= 2) x ^= __shfl_xor_sync(__activemask(), x, other);
            if (writer == 0) p.out[team * pieces + chunk * size + rank] = {x, x};
        }
    uint32_t* last = p.last_workspace + team * team_words(p.group, size, words);
    if (p.stage >= kKeys && warp == 0)
        for (int i = (rank * 32 + lane) * 4; i < team_words(p.group, size, words); i += size * 128)
            publish(last + i, uint4{});
}
