// The two vectors of one page's metadata, by one warp, from its stored keys. Both writing ops use it, so that appended
// and rebuilt metadata have the same bits: NaN stays NaN.
#pragma once
#include <cfloat>

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
    if (row_of_lane == 0) {
        store_bounds<T>(bounds + channel, lo, false);
        store_bounds<T>(bounds + D + channel, hi, true);
    }
}

// N elements that are loaded or stored at once.
template <class E, int N>
struct alignas(sizeof(E) * N) Elements {
    E of[N];
};

template <class M>
__device__ __forceinline__ M nearest(float x) {
    if constexpr (std::is_same_v<M, __nv_fp8_e4m3>) {
        const __nv_fp8_storage_t bits = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
        return bits_as<M>(static_cast<__nv_fp8_storage_t>(bits == 0x80 ? 0 : bits));
    } else {
        return Packed<M>::from_float(x);
    }
}

// Calls f(runs, left) with this lane's channels of kTokens tokens at once, of which `left` or more are there.
template <int N, int kTokens, class T, class F>
__device__ __forceinline__ void for_tokens(const T* channels, int64_t token_stride, int count, F f) {
    for (int first = 0; first < count; first += kTokens) {
        Elements<T, N> runs[kTokens];
#pragma unroll
        for (int i = 0; i < kTokens; ++i)
            runs[i] = *reinterpret_cast<const Elements<T, N>*>(channels + min(first + i, count - 1) * token_stride);
        f(runs, count - first);
    }
}

// Calls f(run) with this lane's channels of each token, in order.
template <int N, class T, class F>
__device__ __forceinline__ void for_each_token(const T* channels, int64_t token_stride, int count, F f) {
    constexpr int kTokens = N < 8 ? 8 : 4;  // 8: the smallest page; registers for 64 bytes
    for_tokens<N, kTokens>(channels, token_stride, count, [&](const auto& runs, int left) {
#pragma unroll
        for (int i = 0; i < kTokens; ++i)
            if (i < left) f(runs[i]);
    });
}

template <int N, class T>
__device__ __forceinline__ void mean_of(float (&mean)[N], const T* channels, int64_t token_stride, int count) {
    for_each_token<N>(channels, token_stride, count, [&](const Elements<T, N>& run) {
#pragma unroll
        for (int i = 0; i < N; ++i) mean[i] = __fadd_rn(mean[i], float(run.of[i]));
    });
#pragma unroll
    for (int i = 0; i < N; ++i) mean[i] = __fdiv_rn(mean[i], float(count));
}

// Mean -+ radius, a lane for D / 32 channels; `mean` of these. In float32, one rounding an operation (the intrinsics
// keep the compiler from contracting), tokens in their order: the CPU kernels and the twin agree in all bits.
template <class T, class M, int D>
__device__ __forceinline__ void store_mean_bounds(const T* keys, int64_t token_stride, int count, BoundRule rule,
                                                  const float (&mean)[D / kWarp], M* bounds) {
    constexpr int N = D / kWarp;
    const int channel = threadIdx.x % kWarp * N;
    const bool squared = rule.kind == BoundKind::kMeanStd;
    float spread[N] = {};
    for_each_token<N>(keys + channel, token_stride, count, [&](const Elements<T, N>& run) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float deviation = __fsub_rn(float(run.of[i]), mean[i]);
            spread[i] = __fadd_rn(spread[i], squared ? __fmul_rn(deviation, deviation) : fabsf(deviation));
        }
    });
    Elements<M, N> lo, hi;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        spread[i] = __fdiv_rn(spread[i], float(count));
        const float radius = __fmul_rn(rule.scale, squared ? __fsqrt_rn(spread[i]) : spread[i]);
        lo.of[i] = nearest<M>(__fadd_rn(__fsub_rn(mean[i], radius), 0.0f));  // -0 + 0 = +0
        hi.of[i] = nearest<M>(__fadd_rn(__fadd_rn(mean[i], radius), 0.0f));
    }
    *reinterpret_cast<Elements<M, N>*>(bounds + channel) = lo;
    *reinterpret_cast<Elements<M, N>*>(bounds + D + channel) = hi;
}

// a . b over all channels, of which each lane has N: neighbours are added, then neighbours of these. Every lane has it.
template <int N>
__device__ __forceinline__ float dot_in_pairs(const float (&a)[N], const float (&b)[N]) {
    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fmul_rn(a[i], b[i]);
#pragma unroll
    for (int n = N / 2; n > 0; n /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = __fadd_rn(x[2 * i], x[2 * i + 1]);
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) x[0] = __fadd_rn(x[0], __shfl_xor_sync(kAllLanes, x[0], step));
    return x[0];
}

// Two points on the axis of largest deviation, nearly (quest_ops/ops.py has the formula): in float32 as above. The
// three passes over the tokens share code: in a decoder code is fetched anew for every layer, which takes longer than
// the arithmetic.
template <class T, class M, int D>
__device__ __forceinline__ void store_principal_points(const T* keys, int64_t token_stride, int count, float scale,
                                                       const float (&mean)[D / kWarp], M* bounds) {
    constexpr int N = D / kWarp, kTokens = N < 8 ? 8 : 4;  // registers
    const int channel = threadIdx.x % kWarp * N;
    // What deviations are multiplied by: themselves, to find the farthest; the farthest; the axis.
    enum Pass { kSquare, kFarthest, kAxis };
    float found[N] = {}, farthest = -1, fourths[2] = {}, inverse = 1;
#pragma unroll 1
    for (int pass = kSquare; pass <= kAxis; ++pass) {
        float next[N] = {};
        for_tokens<N, kTokens>(keys + channel, token_stride, count, [&](const auto& runs, int left) {
            float deviation[kTokens][N], dots[kTokens];
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                float other[N];
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    deviation[t][i] = __fsub_rn(float(runs[t].of[i]), mean[i]);
                    other[i] = pass == kSquare ? deviation[t][i] : found[i];
                }
                dots[t] = __fmul_rn(dot_in_pairs(deviation[t], other), inverse);
            }
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                if (t >= left) break;
                if (pass == kSquare) {
                    const bool first = farthest < 0, farther = first || dots[t] > farthest;
                    if (farther) farthest = dots[t];
#pragma unroll
                    for (int i = 0; i < N; ++i)
                        if (farther) next[i] = deviation[t][i];
                } else if (pass == kFarthest) {
#pragma unroll
                    for (int i = 0; i < N; ++i) next[i] = __fadd_rn(next[i], __fmul_rn(dots[t], deviation[t][i]));
                } else {
                    const float square = __fmul_rn(dots[t], dots[t]), fourth = __fmul_rn(square, square);
                    fourths[0] = __fadd_rn(fourths[0], dots[t] > 0 ? 0 : fourth);
                    fourths[1] = __fadd_rn(fourths[1], dots[t] > 0 ? fourth : 0);
                }
            }
        });
        const bool deviates = farthest >= FLT_MIN;
        if (pass == kSquare) {
            inverse = deviates ? __frcp_rn(farthest) : 0;
        } else if (pass == kFarthest) {
            const float square = dot_in_pairs(next, next), of_length = square > 0 ? __frcp_rn(__fsqrt_rn(square)) : 0;
#pragma unroll
            for (int i = 0; i < N; ++i) next[i] = __fmul_rn(next[i], of_length);
            inverse = deviates ? __frcp_rn(__fsqrt_rn(farthest)) : 0;
        } else {
            break;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) found[i] = next[i];
    }
    const float reach = __fmul_rn(scale, __fsqrt_rn(farthest));
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        const float root = __fsqrt_rn(__fsqrt_rn(__fdiv_rn(fourths[side], float(count))));
        const float radius = __fmul_rn(side == 0 ? -reach : reach, root);
        Elements<M, N> point;
#pragma unroll
        for (int i = 0; i < N; ++i)  // -0 + 0 = +0
            point.of[i] = nearest<M>(__fadd_rn(__fadd_rn(mean[i], __fmul_rn(radius, found[i])), 0.0f));
        *reinterpret_cast<Elements<M, N>*>(bounds + side * D + channel) = point;
    }
}

template <class T, class M, int D>
__device__ __forceinline__ void store_page_bounds(const T* keys, int64_t token_stride, int count, BoundRule rule,
                                                  M* bounds) {
    if (rule.kind == BoundKind::kMinMax) return store_min_max<T, M, D>(keys, token_stride, count, bounds);
    float mean[D / kWarp] = {};
    mean_of(mean, keys + threadIdx.x % kWarp * (D / kWarp), token_stride, count);
    if (rule.kind == BoundKind::kPrincipal)
        store_principal_points<T, M, D>(keys, token_stride, count, rule.scale, mean, bounds);
    else
        store_mean_bounds<T, M, D>(keys, token_stride, count, rule, mean, bounds);
}

}  // namespace quest::cuda
