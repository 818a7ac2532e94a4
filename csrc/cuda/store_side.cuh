// One of the two vectors of a page's metadata, by one warp, in the metadata's type.
#pragma once
#include "device.cuh"

namespace quest::cuda {

// Side 0 or 1 of a page in 4 bits (params.h), by a whole warp: a lane has N adjacent channels, from `channel` on, and
// those that share a scale are neighbours. writes: where several lanes have the same channels, which of them stores.
enum class Rounding { kNearest, kDown, kUp };
template <int N, int D>
__device__ __forceinline__ void store_packed(FourBits* page, int side, int channel, const float (&x)[N],
                                             Rounding rounding, bool writes) {
    float most = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) most = max_keep_nan(most, fabsf(x[i]));
#pragma unroll
    for (int step = 1; step < kScaledChannels / N; step *= 2)
        most = max_keep_nan(most, __shfl_xor_sync(kAllLanes, most, step));
    constexpr unsigned kLargest = 0x7bff, kNan = 0x7e00;
    unsigned bits = __half_as_ushort(__float2half_rn(__fdiv_rn(most, kLargestCode)));
    if (__fmul_rn(__half2float(__ushort_as_half(bits)), kLargestCode) < most) ++bits;
    if (bits > kLargest) bits = most != most ? kNan : kLargest;
    const float scale = __half2float(__ushort_as_half(bits));
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float steps = scale > 0 ? __fdiv_rn(x[i], scale) : 0;
        const float whole = rounding == Rounding::kNearest ? rintf(steps)
                            : rounding == Rounding::kDown  ? floorf(steps)
                                                           : ceilf(steps);
        word |= unsigned(int(fminf(fmaxf(whole, -kLargestCode), kLargestCode)) + 8) << packed_shift(channel % 8 + i);
    }
#pragma unroll
    for (int step = 1; step < 8 / N; step *= 2) word |= __shfl_xor_sync(kAllLanes, word, step);
    if (!writes) return;
    const int c = channel / kScaledChannels;
    uint8_t* bytes = &page->byte;
    if (channel % 8 == 0)
        reinterpret_cast<uint32_t*>(bytes + side * (D / 2))[packed_word(D, c, channel % kScaledChannels / 8)] = word;
    if (channel % kScaledChannels == 0) reinterpret_cast<uint16_t*>(bytes + D + side * (D / 16))[c] = bits;
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

// a . b over all channels, of which each lane has N: neighbours are added, then neighbours of these. First a lane's
// own.
template <int N>
__device__ __forceinline__ float lane_dot_in_pairs(const float (&a)[N], const float (&b)[N]) {
    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fmul_rn(a[i], b[i]);
#pragma unroll
    for (int n = N / 2; n > 0; n /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = __fadd_rn(x[2 * i], x[2 * i + 1]);
    return x[0];
}
// Every lane has it.
template <int N>
__device__ __forceinline__ float dot_in_pairs(const float (&a)[N], const float (&b)[N]) {
    float x = lane_dot_in_pairs(a, b);
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) x = __fadd_rn(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

// Side 0 or 1: mean + offset; a lane for N channels.
template <class M, int N, int D>
__device__ __forceinline__ void store_side(M* bounds, int side, const float (&mean)[N], const float (&offset)[N]) {
    const int channel = threadIdx.x % kWarp * N;
    float vector[N];
#pragma unroll
    for (int i = 0; i < N; ++i) vector[i] = __fadd_rn(__fadd_rn(mean[i], offset[i]), 0.0f);  // -0 + 0 = +0
    if constexpr (std::is_same_v<M, FourBits>) {
        store_packed<N, D>(bounds, side, channel, vector, Rounding::kNearest, true);
    } else {
        Elements<M, N> stored;
#pragma unroll
        for (int i = 0; i < N; ++i) stored.of[i] = nearest<M>(vector[i]);
        *reinterpret_cast<Elements<M, N>*>(bounds + side * D + channel) = stored;
    }
}

}  // namespace quest::cuda
