// Bound "principal" of pages of at most eight tokens, the defaults.
#pragma once
#include <cfloat>

#include "store_side.cuh"

namespace quest::cuda {

// Of eight vectors, x[t] being a lane's own part of the dot product of one, the whole products, each as dot_in_pairs
// has it; every lane has them all. A lane adds for half of the t that are left, then for a quarter.
__device__ __forceinline__ void add_up_dots(float (&dots)[8], float (&x)[8]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
        const int left = 4 / step;
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < left; ++i) {
            const float kept = upper ? x[i + left] : x[i], given = upper ? x[i] : x[i + left];
            x[i] = __fadd_rn(kept, __shfl_xor_sync(kAllLanes, given, step));
        }
    }
#pragma unroll
    for (int step = 8; step < kWarp; step *= 2) x[0] = __fadd_rn(x[0], __shfl_xor_sync(kAllLanes, x[0], step));
#pragma unroll
    for (int t = 0; t < 8; ++t) dots[t] = __shfl_sync(kAllLanes, x[0], (t >> 2 & 1) | (t & 2) | (t & 1) << 2);
}

// Two points of at most eight tokens, the defaults' pages: the same numbers as store_bounds_about_mean's, all keys in
// registers, every step once. In a decoder a step often waits for this.
template <class T, class M, int D>
__device__ __forceinline__ void store_points_of_few(const T* keys, int64_t token_stride, int count, float scale,
                                                    M* bounds) {
    constexpr int N = D / kWarp;
    keys += threadIdx.x % kWarp * N;
    float deviation[8][N], mean[N] = {}, axis[N] = {}, own[8], dots[8];
#pragma unroll
    for (int t = 0; t < 8; ++t) {
        const auto key = *reinterpret_cast<const Elements<T, N>*>(keys + min(t, count - 1) * token_stride);
#pragma unroll
        for (int i = 0; i < N; ++i) deviation[t][i] = float(key.of[i]);
    }
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int i = 0; i < N; ++i) mean[i] = t < count ? __fadd_rn(mean[i], deviation[t][i]) : mean[i];
#pragma unroll
    for (int i = 0; i < N; ++i) mean[i] = __fdiv_rn(mean[i], float(count));
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int i = 0; i < N; ++i) deviation[t][i] = __fsub_rn(deviation[t][i], mean[i]);
    auto dots_with = [&](const float (&b)[N], float factor) {
#pragma unroll
        for (int t = 0; t < 8; ++t) own[t] = lane_dot_in_pairs(deviation[t], b);
        add_up_dots(dots, own);
#pragma unroll
        for (int t = 0; t < 8; ++t) dots[t] = __fmul_rn(dots[t], factor);
    };
#pragma unroll
    for (int t = 0; t < 8; ++t) own[t] = lane_dot_in_pairs(deviation[t], deviation[t]);
    add_up_dots(dots, own);
    float farthest = dots[0];
#pragma unroll
    for (int i = 0; i < N; ++i) axis[i] = deviation[0][i];
#pragma unroll
    for (int t = 1; t < 8; ++t) {
        const bool farther = t < count && dots[t] > farthest;
        farthest = farther ? dots[t] : farthest;
#pragma unroll
        for (int i = 0; i < N; ++i) axis[i] = farther ? deviation[t][i] : axis[i];
    }
    const bool deviates = farthest >= FLT_MIN;
    const float length = __fsqrt_rn(farthest);
    dots_with(axis, deviates ? __frcp_rn(farthest) : 0);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        axis[i] = 0;
#pragma unroll
        for (int t = 0; t < 8; ++t)
            axis[i] = t < count ? __fadd_rn(axis[i], __fmul_rn(deviation[t][i], dots[t])) : axis[i];
    }
    const float square = dot_in_pairs(axis, axis), inverse = square > 0 ? __frcp_rn(__fsqrt_rn(square)) : 0;
#pragma unroll
    for (int i = 0; i < N; ++i) axis[i] = __fmul_rn(axis[i], inverse);
    dots_with(axis, deviates ? __frcp_rn(length) : 0);
    float fourths[2] = {};
#pragma unroll
    for (int t = 0; t < 8; ++t) {
        const float twice = __fmul_rn(dots[t], dots[t]), fourth = t < count ? __fmul_rn(twice, twice) : 0;
        fourths[0] = __fadd_rn(fourths[0], dots[t] > 0 ? 0 : fourth);
        fourths[1] = __fadd_rn(fourths[1], dots[t] > 0 ? fourth : 0);
    }
    const float reach = __fmul_rn(scale, length);
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
        const float fourth = side == 0 ? fourths[0] : fourths[1];
        const float far = __fmul_rn(reach, __fsqrt_rn(__fsqrt_rn(__fdiv_rn(fourth, float(count)))));
        float offset[N];
#pragma unroll
        for (int i = 0; i < N; ++i) offset[i] = __fmul_rn(side == 0 ? -far : far, axis[i]);
        store_side<M, N, D>(bounds, side, mean, offset);
    }
}

}  // namespace quest::cuda
