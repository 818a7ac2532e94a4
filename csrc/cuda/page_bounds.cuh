// The bounds of one page, by one warp: channel-wise minimum and maximum of its stored keys. Both writing ops use it, so
// that appended and rebuilt metadata have the same bits: NaN stays NaN, zero is +0.
#pragma once
#include "device.cuh"

namespace quest::cuda {

template <class T>
struct PairBounds {
    typename Packed<T>::Pair lo, hi;

    __device__ __forceinline__ void include(typename Packed<T>::Pair low, typename Packed<T>::Pair high) {
        lo = __hmin2_nan(lo, low);
        hi = __hmax2_nan(hi, high);
    }
};

// Lanes read 16 bytes: D / 8 of them a row, so kWarp * 8 / D rows at once. `keys`: the page's first key, of `count` >=
// 1 keys.
template <class T, int D>
__device__ void store_page_bounds(const T* keys, int64_t token_stride, int count, T* bounds) {
    using Pair = typename Packed<T>::Pair;
    constexpr int kLanesPerRow = D / 8, kRowsAtOnce = kWarp / kLanesPerRow, kUnroll = 4;  // 4 loads in flight a lane
    const int lane = threadIdx.x % kWarp, channel = lane % kLanesPerRow * 8, row_of_lane = lane / kLanesPerRow;
    PairBounds<T> pairs[4];
    for (int first = 0; first < count; first += kRowsAtOnce * kUnroll) {
        uint4 rows[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int token =
                min(first + i * kRowsAtOnce + row_of_lane, count - 1);  // past the end: the last key once more
            rows[i] = *reinterpret_cast<const uint4*>(keys + token * token_stride + channel);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const uint32_t words[4] = {rows[i].x, rows[i].y, rows[i].z, rows[i].w};
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const Pair x = bits_as<Pair>(words[w]);
                if (first == 0 && i == 0)
                    pairs[w] = {x, x};
                else
                    pairs[w].include(x, x);
            }
        }
    }
    uint32_t lo[4], hi[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int step = kLanesPerRow; step < kWarp; step *= 2)
            pairs[w].include(bits_as<Pair>(__shfl_xor_sync(kAllLanes, bits_as<uint32_t>(pairs[w].lo), step)),
                             bits_as<Pair>(__shfl_xor_sync(kAllLanes, bits_as<uint32_t>(pairs[w].hi), step)));
        const Pair zero = bits_as<Pair>(0u);
        lo[w] = bits_as<uint32_t>(__hadd2(pairs[w].lo, zero));  // -0 + 0 = +0
        hi[w] = bits_as<uint32_t>(__hadd2(pairs[w].hi, zero));
    }
    if (row_of_lane == 0) {
        *reinterpret_cast<uint4*>(bounds + channel) = {lo[0], lo[1], lo[2], lo[3]};
        *reinterpret_cast<uint4*>(bounds + D + channel) = {hi[0], hi[1], hi[2], hi[3]};
    }
}

}  // namespace quest::cuda
