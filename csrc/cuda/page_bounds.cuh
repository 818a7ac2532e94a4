// The two vectors of one page's metadata, by one warp, from its stored keys. Both writing ops use it, so that appended
// and rebuilt metadata have the same bits: NaN stays NaN.
#pragma once
#include "points.cuh"

namespace quest::cuda {

// A KV head's part of a page: its first key or value, and its metadata.
template <class T>
__device__ __forceinline__ T* page_rows(const Pool& pool, int block, int part, int page_size, int head) {
    return static_cast<T*>(pool.data) + block * pool.block_stride + part * page_size * pool.token_stride +
           head * pool.head_stride;
}
template <class M, int D>
__device__ __forceinline__ M* page_metadata(const Metadata& metadata, int block, int part, int head) {
    return static_cast<M*>(metadata.data) + block * metadata.block_stride + head * metadata.head_stride +
           part * kPageElements<M, D>;
}

template <class T>
struct PairBounds {
    typename Packed<T>::Pair lo, hi;

    __device__ __forceinline__ void include(typename Packed<T>::Pair low, typename Packed<T>::Pair high) {
        lo = __hmin2_nan(lo, low);
        hi = __hmax2_nan(hi, high);
    }
};

// x in e4m3, rounded down or up, saturating at 448; NaN stays NaN, zero is +0.
__device__ __forceinline__ uint32_t outward(float x, bool up) {
    const uint32_t nearest = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
    const float back = __half2float(half(__nv_cvt_fp8_to_halfraw(nearest, __NV_E4M3)));
    // Finite values in their order: 0xfe (-448) .. 0x81 are -126 .. -1, 0x80 and 0x00 are 0, 0x01 .. 0x7e are 1 .. 126.
    const int magnitude = nearest & 0x7f;
    int place = nearest & 0x80 ? -magnitude : magnitude;
    if (up ? back < x : back > x) place = min(max(place + (up ? 1 : -1), -126), 126);
    return place < 0 ? 0x80 - place : place;
}

// Eight bounds of this lane, stored in the metadata's type.
template <class T>
__device__ __forceinline__ void store_bounds(T* to, const uint32_t (&pairs)[4], bool) {
    *reinterpret_cast<uint4*>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
}
template <class T>
__device__ __forceinline__ void store_bounds(__nv_fp8_e4m3* to, const uint32_t (&pairs)[4], bool up) {
    uint32_t words[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
        const float2 a = Packed<T>::to_floats(bits_as<typename Packed<T>::Pair>(pairs[2 * w]));
        const float2 b = Packed<T>::to_floats(bits_as<typename Packed<T>::Pair>(pairs[2 * w + 1]));
        words[w] = outward(a.x, up) | outward(a.y, up) << 8 | outward(b.x, up) << 16 | outward(b.y, up) << 24;
    }
    *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
}

// Minimum and maximum, zero as +0. Lanes read 16 bytes: D / 8 of them a row, so kWarp * 8 / D rows at once. `keys`: the
// page's first key, of `count` >= 1 keys.
template <class T, class M, int D>
__device__ void store_min_max(const T* keys, int64_t token_stride, int count, M* bounds) {
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
    if constexpr (std::is_same_v<M, FourBits>) {
#pragma unroll 1
        for (int side = 0; side < 2; ++side) {
            float x[8];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const float2 pair = Packed<T>::to_floats(bits_as<Pair>(side == 0 ? lo[w] : hi[w]));
                x[2 * w] = pair.x, x[2 * w + 1] = pair.y;
            }
            store_packed<8, D>(bounds, side, channel, x, side == 0 ? Rounding::kDown : Rounding::kUp, row_of_lane == 0);
        }
    } else if (row_of_lane == 0) {
        store_bounds<T>(bounds + channel, lo, false);
        store_bounds<T>(bounds + D + channel, hi, true);
    }
}

// Mean -+ radius (quest_ops/ops.py has the formulas); a lane for D / 32 channels. In float32, one rounding an
// operation, tokens in their order, as `store_points`. Both passes over the tokens share code: in a decoder code is
// fetched anew for every layer, which takes longer than the arithmetic.
template <class T, class M, int D>
__device__ __noinline__ void store_mean_and_radius(const T* keys, int64_t token_stride, int count, BoundRule rule,
                                                   M* bounds) {
    constexpr int N = D / kWarp, kTokens = D <= 128 ? 4 : 2;  // at once
    keys += threadIdx.x % kWarp * N;
    const bool squared = rule.kind == BoundKind::kMeanStd;
    float mean[N] = {}, radius[N] = {};
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {  // deviations are added up as they are, from 0: to the mean; then as radii
        float sum[N] = {};
#pragma unroll 1
        for (int first = 0; first < count; first += kTokens) {
            Elements<T, N> runs[kTokens];
#pragma unroll
            for (int t = 0; t < kTokens; ++t)
                runs[t] = *reinterpret_cast<const Elements<T, N>*>(keys + min(first + t, count - 1) * token_stride);
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                if (first + t >= count) break;
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const float x = __fsub_rn(float(runs[t].of[i]), mean[i]);
                    sum[i] = __fadd_rn(sum[i], pass == 0 ? x : squared ? __fmul_rn(x, x) : fabsf(x));
                }
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) (pass == 0 ? mean[i] : radius[i]) = __fdiv_rn(sum[i], float(count));
    }
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
        const float sign = side == 0 ? -rule.scale : rule.scale;
        float offset[N];
#pragma unroll
        for (int i = 0; i < N; ++i) offset[i] = __fmul_rn(sign, squared ? __fsqrt_rn(radius[i]) : radius[i]);
        store_side<M, N, D>(bounds, side, mean, offset);
    }
}

template <class T, class M, int D>
__device__ __forceinline__ void store_page_bounds(const T* keys, int64_t token_stride, int count, BoundRule rule,
                                                  M* bounds) {
    if (rule.kind == BoundKind::kPrincipal)
        store_points<T, M, D>(keys, token_stride, count, rule.scale, bounds);
    else if (rule.kind == BoundKind::kMinMax)
        store_min_max<T, M, D>(keys, token_stride, count, bounds);
    else
        store_mean_and_radius<T, M, D>(keys, token_stride, count, rule, bounds);
}

}  // namespace quest::cuda
