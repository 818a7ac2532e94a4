// The two vectors of one page's metadata, by one warp, from its stored keys. Both writing ops use it, so that appended
// and rebuilt metadata have the same bits: NaN stays NaN.
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

// Calls f(run) with this lane's channels of each token, in order, kUnroll loads in flight.
template <int N, class T, class F>
__device__ __forceinline__ void for_each_token(const T* channels, int64_t token_stride, int count, F f) {
    constexpr int kUnroll = N < 8 ? 8 : 4;  // 8: the smallest page; registers for 64 bytes
    for (int first = 0; first < count; first += kUnroll) {
        Elements<T, N> runs[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            runs[i] = *reinterpret_cast<const Elements<T, N>*>(channels + min(first + i, count - 1) * token_stride);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (first + i < count) f(runs[i]);
    }
}

// Mean -+ radius. In float32, one rounding an operation (the intrinsics keep the compiler from contracting), tokens in
// their order, a lane for D / 32 channels: the CPU kernels and the twin agree in all bits.
template <class T, class M, int D>
__device__ void store_mean_bounds(const T* keys, int64_t token_stride, int count, BoundRule rule, M* bounds) {
    constexpr int N = D / kWarp;
    const int channel = threadIdx.x % kWarp * N;
    const bool squared = rule.kind == BoundKind::kMeanStd;
    const float tokens = count;
    float mean[N] = {}, spread[N] = {};
    for_each_token<N>(keys + channel, token_stride, count, [&](const Elements<T, N>& run) {
#pragma unroll
        for (int i = 0; i < N; ++i) mean[i] = __fadd_rn(mean[i], float(run.of[i]));
    });
#pragma unroll
    for (int i = 0; i < N; ++i) mean[i] = __fdiv_rn(mean[i], tokens);
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
        spread[i] = __fdiv_rn(spread[i], tokens);
        const float radius = __fmul_rn(rule.scale, squared ? __fsqrt_rn(spread[i]) : spread[i]);
        lo.of[i] = nearest<M>(__fadd_rn(__fsub_rn(mean[i], radius), 0.0f));  // -0 + 0 = +0
        hi.of[i] = nearest<M>(__fadd_rn(__fadd_rn(mean[i], radius), 0.0f));
    }
    *reinterpret_cast<Elements<M, N>*>(bounds + channel) = lo;
    *reinterpret_cast<Elements<M, N>*>(bounds + D + channel) = hi;
}

template <class T, class M, int D>
__device__ __forceinline__ void store_page_bounds(const T* keys, int64_t token_stride, int count, BoundRule rule,
                                                  M* bounds) {
    if (rule.kind == BoundKind::kMinMax)
        store_min_max<T, M, D>(keys, token_stride, count, bounds);
    else
        store_mean_bounds<T, M, D>(keys, token_stride, count, rule, bounds);
}

}  // namespace quest::cuda
