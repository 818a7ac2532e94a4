// The score of 16 pages by one warp: score(page) = q+ . hi + q- . lo, reduced over the query heads of a KV head. The
// pages' bounds are the A operand of an mma, read from global memory straight into registers; the group's query heads
// are B.
#pragma once
#include "device.cuh"

namespace quest::cuda {

// Keeps only the positive (or negative) part of two elements; NaN stays NaN.
template <class T>
__device__ __forceinline__ uint32_t positive_part(uint32_t x) {
    using Pair = typename Packed<T>::Pair;
    return bits_as<uint32_t>(__hmax2_nan(bits_as<Pair>(x), bits_as<Pair>(0u)));
}
template <class T>
__device__ __forceinline__ uint32_t negative_part(uint32_t x) {
    using Pair = typename Packed<T>::Pair;
    return bits_as<uint32_t>(__hmin2_nan(bits_as<Pair>(x), bits_as<Pair>(0u)));
}

// Where a page's bounds lie. A tile's last pages may not exist: they take another page's place, and their scores count
// for nothing.
struct PagePlace {
    int block, part;
};

// The bounds of pages g and g + 8 of a tile, as this lane's part of the A operand.
template <class T, int D>
struct PageTile {
    static constexpr int kChunks = D / 32;
    uint4 lo[2][kChunks], hi[2][kChunks];

    // `metadata`: of the KV head, in block 0.
    __device__ __forceinline__ void load(const T* metadata, int64_t block_stride, const PagePlace (&places)[2]) {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int half_tile = 0; half_tile < 2; ++half_tile) {
            const T* bounds =
                metadata + places[half_tile].block * block_stride + places[half_tile].part * (2 * D) + 8 * t;
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                lo[half_tile][c] = load_streaming(bounds + 32 * c);
                hi[half_tile][c] = load_streaming(bounds + D + 32 * c);
            }
        }
    }

    // c: pages g, g + 8 (rows) against heads 2 t, 2 t + 1 (columns) of eight; `query`: channels 32 c + 8 t .. of head
    // g, for each c.
    __device__ __forceinline__ void multiply(float (&c)[4], const uint4 (&query)[kChunks]) const {
        float above[2][4] = {}, below[2][4] = {};
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const uint4 q = query[chunk];
            const uint4 q_pos{positive_part<T>(q.x), positive_part<T>(q.y), positive_part<T>(q.z),
                              positive_part<T>(q.w)};
            const uint4 q_neg{negative_part<T>(q.x), negative_part<T>(q.y), negative_part<T>(q.z),
                              negative_part<T>(q.w)};
            multiply_32_channels<T>(above, hi[0][chunk], hi[1][chunk], q_pos);
            multiply_32_channels<T>(below, lo[0][chunk], lo[1][chunk], q_neg);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = (above[0][i] + above[1][i]) + (below[0][i] + below[1][i]);
    }
};

// The largest score, and the sum of scores, over the heads seen so far, of pages g and g + 8.
struct HeadReducer {
    float best[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

    // c: of a product with heads first_head .. + 7 of `group`. Columns past the group repeat its last head: harmless to
    // a maximum.
    __device__ __forceinline__ void include(const float (&c)[4], int first_head, int group) {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            best[i / 2] = max_keep_nan(best[i / 2], c[i]);
            if (first_head + 2 * t + i % 2 < group) sum[i / 2] += c[i];
        }
    }
    // The same in the four lanes of a page.
    __device__ __forceinline__ float score(int half_tile, bool use_max, int group) const {
        float top = best[half_tile], total = sum[half_tile];
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            top = max_keep_nan(top, __shfl_xor_sync(kAllLanes, top, step));
            total += __shfl_xor_sync(kAllLanes, total, step);
        }
        return use_max ? top : total / group;
    }
};

}  // namespace quest::cuda
