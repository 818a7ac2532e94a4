// The two vectors of one page's metadata, by one warp, from its stored keys. Both writing ops use it, so that appended
// and rebuilt metadata have the same bits: NaN stays NaN.
#pragma once
#include <cfloat>

#include "few_points.cuh"

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

// Mean -+ radius, or two points on the axis of largest deviation, nearly (quest_ops/ops.py has the formulas); a lane
// for D / 32 channels. In float32, one rounding an operation (the intrinsics keep the compiler from contracting),
// tokens in their order: the CPU kernels and the twin agree in all bits. All passes over the tokens share code: in a
// decoder code is fetched anew for every layer, which takes longer than the arithmetic.
// kTokens: at once.
template <class T, class M, int D, int kTokens>
__device__ __noinline__ void store_bounds_about_mean(const T* keys, int64_t token_stride, int count, BoundRule rule,
                                                     M* bounds) {
    constexpr int N = D / kWarp;
    const int channel = threadIdx.x % kWarp * N;
    keys += channel;
    // The deviations are added up as they are (from 0: to the mean), as radii, or multiplied: by themselves, to find
    // the farthest; by the farthest; by the axis.
    enum Pass { kMean, kRadius, kSquare, kFarthest, kAxis };
    const bool points = rule.kind == BoundKind::kPrincipal, squared = rule.kind == BoundKind::kMeanStd;
    float mean[N] = {}, found[N] = {}, farthest = -1, fourths[2] = {}, inverse = 1;
    int pass = kMean;
    while (true) {
        float next[N] = {};
#pragma unroll 1
        for (int first = 0; first < count; first += kTokens) {
            Elements<T, N> runs[kTokens];
#pragma unroll
            for (int t = 0; t < kTokens; ++t)
                runs[t] = *reinterpret_cast<const Elements<T, N>*>(keys + min(first + t, count - 1) * token_stride);
            float deviation[kTokens][N], dots[kTokens];
#pragma unroll
            for (int t = 0; t < kTokens; ++t)
#pragma unroll
                for (int i = 0; i < N; ++i) deviation[t][i] = __fsub_rn(float(runs[t].of[i]), mean[i]);
            if (pass >= kSquare)
#pragma unroll
                for (int t = 0; t < kTokens; ++t) {
                    float other[N];
#pragma unroll
                    for (int i = 0; i < N; ++i) other[i] = pass == kSquare ? deviation[t][i] : found[i];
                    dots[t] = __fmul_rn(dot_in_pairs(deviation[t], other), inverse);
                }
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                if (first + t >= count) break;
                if (pass == kSquare) {
                    const bool farther = farthest < 0 || dots[t] > farthest;
                    if (farther) farthest = dots[t];
#pragma unroll
                    for (int i = 0; i < N; ++i)
                        if (farther) next[i] = deviation[t][i];
                } else if (pass == kAxis) {
                    const float square = __fmul_rn(dots[t], dots[t]), fourth = __fmul_rn(square, square);
                    fourths[0] = __fadd_rn(fourths[0], dots[t] > 0 ? 0 : fourth);
                    fourths[1] = __fadd_rn(fourths[1], dots[t] > 0 ? fourth : 0);
                } else {
                    const float factor = pass == kFarthest ? dots[t] : 1.f;
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                        const float x = deviation[t][i], by = pass == kRadius && squared ? x : factor;
                        next[i] = __fadd_rn(next[i], __fmul_rn(pass == kRadius && !squared ? fabsf(x) : x, by));
                    }
                }
            }
        }
        if (pass == kAxis) break;
        float scale = 1;
        if (pass == kFarthest) {
            const float square = dot_in_pairs(next, next);
            scale = square > 0 ? __frcp_rn(__fsqrt_rn(square)) : 0;
        }
        const bool averages = pass <= kRadius;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float x = averages ? __fdiv_rn(next[i], float(count)) : __fmul_rn(next[i], scale);
            if (pass == kMean)
                mean[i] = x;
            else
                found[i] = x;
        }
        if (pass == kRadius) break;
        if (pass == kSquare) inverse = farthest >= FLT_MIN ? __frcp_rn(farthest) : 0;
        if (pass == kFarthest) inverse = farthest >= FLT_MIN ? __frcp_rn(__fsqrt_rn(farthest)) : 0;
        pass = pass == kMean ? (points ? kSquare : kRadius) : pass + 1;
    }
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
        // A point is mean + radius * found, or, the radius being found, mean + sign * found.
        float radius = side == 0 ? -1 : 1;
        if (points) {
            const float fourth = side == 0 ? fourths[0] : fourths[1];
            const float reach = __fmul_rn(rule.scale, __fsqrt_rn(farthest));
            radius *= __fmul_rn(reach, __fsqrt_rn(__fsqrt_rn(__fdiv_rn(fourth, float(count)))));
        } else {
            radius *= rule.scale;
        }
        float vector[N];
#pragma unroll
        for (int i = 0; i < N; ++i) vector[i] = __fmul_rn(radius, squared ? __fsqrt_rn(found[i]) : found[i]);
        store_side<M, N, D>(bounds, side, mean, vector);
    }
}

// kCompact: in little code, for a launch that does other things as well.
template <class T, class M, int D, bool kCompact>
__device__ __forceinline__ void store_page_bounds(const T* keys, int64_t token_stride, int count, BoundRule rule,
                                                  M* bounds) {
    if (rule.kind == BoundKind::kPrincipal && count <= 8)
        store_points_of_few<T, M, D>(keys, token_stride, count, rule.scale, bounds);
    else if (rule.kind == BoundKind::kMinMax)
        store_min_max<T, M, D>(keys, token_stride, count, bounds);
    else
        store_bounds_about_mean<T, M, D, kCompact ? 1 : D <= 128 ? 4 : 2>(keys, token_stride, count, rule, bounds);
}

}  // namespace quest::cuda
