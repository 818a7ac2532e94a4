// The score of 16 pages by one warp: score(page) = q+ . hi + q- . lo, reduced over the query heads of a KV head. The pages' bounds are the
// A operand of an mma, read from global memory straight into registers; the group's query heads are B.
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

// The bounds of pages first + g and first + g + 8, as this lane's part of the A operand.
template <class T, int D>
struct PageTile {
    static constexpr int kChunks = D / 32;
    uint4 lo[2][kChunks], hi[2][kChunks];

    // `metadata`: of the KV head, in block 0. Pages from num_pages on read as zeros.
    __device__ __forceinline__ void load(const T* metadata, int64_t block_stride, const int32_t* table, int pages_per_block, int first, int num_pages) {
        const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int half_tile = 0; half_tile < 2; ++half_tile) {
            const int page = first + g + 8 * half_tile;
            const bool exists = page < num_pages;
            const int block = exists ? table[page / pages_per_block] : 0;
            const T* bounds = metadata + block * block_stride + page % pages_per_block * (2 * D) + 8 * t;
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                lo[half_tile][c] = exists ? load_streaming(bounds + 32 * c) : uint4{};
                hi[half_tile][c] = exists ? load_streaming(bounds + D + 32 * c) : uint4{};
            }
        }
    }

    // c: pages g, g + 8 (rows) against heads 2 t, 2 t + 1 (columns) of the eight whose channels 8 t .. of head g are at `query`.
    __device__ __forceinline__ void multiply(float (&c)[4], const T* query) const {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const uint4 q = *reinterpret_cast<const uint4*>(query + 32 * chunk);
            const uint4 q_pos{positive_part<T>(q.x), positive_part<T>(q.y), positive_part<T>(q.z), positive_part<T>(q.w)};
            const uint4 q_neg{negative_part<T>(q.x), negative_part<T>(q.y), negative_part<T>(q.z), negative_part<T>(q.w)};
            multiply_32_channels<T>(c, hi[0][chunk], hi[1][chunk], q_pos);
            multiply_32_channels<T>(c, lo[0][chunk], lo[1][chunk], q_neg);
        }
    }
};

// Scores of pages g and g + 8 of a tile, the same in the four lanes of a page. by_head(column, half_tile, score) sees each head's own.
template <class T, int D, class F>
__device__ __forceinline__ void score_tile(const PageTile<T, D>& tile, const T* group_query, int64_t head_stride, int group, bool use_max,
                                           float (&scores)[2], F&& by_head) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    float best[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
    for (int first_head = 0; first_head < group; first_head += 8) {
        // Columns past the group repeat its last head: harmless to a maximum, left out of the rest.
        float c[4] = {};
        tile.multiply(c, group_query + min(first_head + g, group - 1) * head_stride + 8 * t);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = first_head + 2 * t + i % 2;
            best[i / 2] = max_keep_nan(best[i / 2], c[i]);
            if (column < group) {
                sum[i / 2] += c[i];
                by_head(column, i / 2, c[i]);
            }
        }
    }
#pragma unroll
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            best[half_tile] = max_keep_nan(best[half_tile], __shfl_xor_sync(kAllLanes, best[half_tile], step));
            sum[half_tile] += __shfl_xor_sync(kAllLanes, sum[half_tile], step);
        }
        scores[half_tile] = use_max ? best[half_tile] : sum[half_tile] / group;
    }
}

}  // namespace quest::cuda
