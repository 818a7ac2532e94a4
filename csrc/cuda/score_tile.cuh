// The score of 16 pages by one warp: score(page) = q+ . hi + q- . lo, or, of points, max(q . hi, q . lo), reduced over
// the query heads of a KV head. The pages' bounds are the A operand of an mma, read from global memory straight into
// registers; the group's query heads are B.
#pragma once
#include "device.cuh"

namespace quest::cuda {

// What of a query goes with hi and with lo: its positive and its negative part, or, where these are points, all of it.
// NaN stays NaN.
template <class T>
struct QueryParts {
    using Pair = typename Packed<T>::Pair;
    static constexpr uint32_t kInfinities = std::is_same_v<T, half> ? 0x7c007c00u : 0x7f807f80u;
    bool points;
    uint32_t least, most;

    __device__ __forceinline__ explicit QueryParts(bool points)
        : points(points), least(points ? kInfinities | 0x80008000u : 0u), most(points ? kInfinities : 0u) {}
    __device__ __forceinline__ uint4 of_hi(const uint4& q) const {
        auto part = [&](uint32_t x) { return bits_as<uint32_t>(__hmax2_nan(bits_as<Pair>(x), bits_as<Pair>(least))); };
        return {part(q.x), part(q.y), part(q.z), part(q.w)};
    }
    __device__ __forceinline__ uint4 of_lo(const uint4& q) const {
        auto part = [&](uint32_t x) { return bits_as<uint32_t>(__hmin2_nan(bits_as<Pair>(x), bits_as<Pair>(most))); };
        return {part(q.x), part(q.y), part(q.z), part(q.w)};
    }
    __device__ __forceinline__ float score(float of_hi, float of_lo) const {
        return points ? max_keep_nan(of_hi, of_lo) : of_hi + of_lo;
    }
};

// Where a page's bounds lie. A tile's last pages may not exist: they take another page's place, and their scores count
// for nothing.
struct PagePlace {
    int block, part;
};

// Where the bounds of pages g and g + 8 lie, this lane's part. block_bytes: from block to block.
template <uint32_t kPageBytes>
struct PageSource {
    const char* bounds[2];

    __device__ __forceinline__ PageSource(const char* lane_part, uint32_t block_bytes, const PagePlace (&places)[2]) {
#pragma unroll
        for (int half_tile = 0; half_tile < 2; ++half_tile)
            bounds[half_tile] =
                offset(offset(lane_part, places[half_tile].block, block_bytes), places[half_tile].part, kPageBytes);
    }
    // Into L2. The four lanes of a page share its lines. lane_bytes: where this lane's part begins.
    __device__ __forceinline__ void prefetch(int lane_bytes) const {
        constexpr int kLine = 128;
#pragma unroll
        for (int half_tile = 0; half_tile < 2; ++half_tile)
            for (int at = threadIdx.x % 4 * kLine; at < kPageBytes; at += 4 * kLine)
                quest::cuda::prefetch(bounds[half_tile] + at - lane_bytes);
    }
};

// Bounds in 8 bits become pairs of the query's type, exactly; NaN stays NaN.
template <class T>
__device__ __forceinline__ uint32_t widen(uint32_t two_bytes) {
    const half2 pair = half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two_bytes), __NV_E4M3));
    if constexpr (std::is_same_v<T, half>)
        return bits_as<uint32_t>(pair);
    else
        return bits_as<uint32_t>(__float22bfloat162_rn(__half22float2(pair)));
}
template <class T>
__device__ __forceinline__ uint4 widen_low(uint32_t a, uint32_t b) {
    return {widen<T>(a & 0xffff), widen<T>(a >> 16), widen<T>(b & 0xffff), widen<T>(b >> 16)};
}

// The bounds of pages g and g + 8 of a tile, as this lane's part of the A operand. M: how they are stored, T or 8 bits.
template <class T, class M, int D>
struct PageTile {
    static constexpr bool kNarrow = sizeof(M) == 1;
    static constexpr int kLoads = D * sizeof(M) / 64, kChunks = D / 32;
    static constexpr uint32_t kPageBytes = 2 * D * sizeof(M);
    uint4 lo[2][kLoads], hi[2][kLoads];

    // Which channels this lane's part of chunk c of a query begins with: eight of them, that go with its bounds.
    static __device__ __forceinline__ int channel(int c) {
        const int t = threadIdx.x % 4;
        return kNarrow ? c / 2 * 64 + 16 * t + c % 2 * 8 : 32 * c + 8 * t;
    }

    // This lane's part of a KV head's metadata, in block 0.
    static __device__ __forceinline__ const char* lane_part(const Metadata& metadata, int kv_head) {
        return static_cast<const char*>(metadata.data) + kv_head * metadata.head_stride * int64_t(sizeof(M)) +
               threadIdx.x % 4 * 16;
    }

    using Source = PageSource<kPageBytes>;
    __device__ __forceinline__ void load_part(const Source& from, int c) {
#pragma unroll
        for (int half_tile = 0; half_tile < 2; ++half_tile) {
            lo[half_tile][c] = load_streaming(from.bounds[half_tile] + 64 * c);
            hi[half_tile][c] = load_streaming(from.bounds[half_tile] + kPageBytes / 2 + 64 * c);
        }
    }
    __device__ __forceinline__ void load(const Source& from) {
#pragma unroll
        for (int c = 0; c < kLoads; ++c) load_part(from, c);
    }

    static __device__ __forceinline__ void prefetch(const Source& from) { from.prefetch(threadIdx.x % 4 * 16); }

    static __device__ __forceinline__ uint4 chunk_of(const uint4 (&bounds)[kLoads], int c) {
        if constexpr (kNarrow)
            return c % 2 == 0 ? widen_low<T>(bounds[c / 2].x, bounds[c / 2].y)
                              : widen_low<T>(bounds[c / 2].z, bounds[c / 2].w);
        else
            return bounds[c];
    }

    // What the product takes of a chunk of a query.
    using Query = uint4;
    static __device__ __forceinline__ uint4 prepare(const uint4& q, const QueryParts<T>&) { return q; }

    // c: pages g, g + 8 (rows) against heads 2 t, 2 t + 1 (columns) of eight; query(c): channels channel(c) .. of head
    // g. done(i) is called when part i of the tile is no longer needed.
    template <class QueryOf, class Done>
    __device__ __forceinline__ void multiply(float (&c)[4], const QueryParts<T>& parts, QueryOf&& query, Done&& done) {
        float above[2][4] = {}, below[2][4] = {};
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const uint4 q = query(chunk);
            multiply_32_channels<T>(above, chunk_of(hi[0], chunk), chunk_of(hi[1], chunk), parts.of_hi(q));
            multiply_32_channels<T>(below, chunk_of(lo[0], chunk), chunk_of(lo[1], chunk), parts.of_lo(q));
            if (!kNarrow || chunk % 2 == 1) done(kNarrow ? chunk / 2 : chunk);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = parts.score(above[0][i] + above[1][i], below[0][i] + below[1][i]);
    }
};

// The largest score, or the sum of scores, over the heads seen so far, of pages g and g + 8.
struct HeadReducer {
    bool use_max;
    float value[2];

    __device__ __forceinline__ explicit HeadReducer(HeadReduction reduction)
        : use_max(reduction == HeadReduction::kMax), value{use_max ? -INFINITY : 0.f, use_max ? -INFINITY : 0.f} {}

    // c: of a product with heads first_head .. + 7 of `group`. Columns past the group repeat its last head: harmless to
    // a maximum.
    __device__ __forceinline__ void include(const float (&c)[4], int first_head, int group) {
        const int head = first_head + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (use_max)
                value[i / 2] = max_keep_nan(value[i / 2], c[i]);
            else if (head + i % 2 < group)
                value[i / 2] += c[i];
        }
    }
    // In lanes of even t the score of page g, in those of odd t that of page g + 8.
    __device__ __forceinline__ float score(int group) const {
        const bool odd = threadIdx.x & 1;
        float mine = odd ? value[1] : value[0];
        const float others = odd ? value[0] : value[1];
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            const float x = __shfl_xor_sync(kAllLanes, step == 1 ? others : mine, step);
            mine = use_max ? max_keep_nan(mine, x) : mine + x;
        }
        return use_max ? mine : mine / group;
    }
};

}  // namespace quest::cuda
