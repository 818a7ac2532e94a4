// Bound "principal": two points on the axis of largest deviation, nearly (quest_ops/ops.py has the formulas). In
// float32, one rounding an operation (the intrinsics keep the compiler from contracting), tokens in their order: the
// CPU kernels and the twin agree in all bits.
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

// By a warp, a lane for D / 32 channels, eight tokens at a time; eight or fewer, the defaults' pages, stay in registers
// from step to step. In a decoder a step often waits for this: of more tokens first all keys are brought near.
template <class T, class M, int D>
__device__ __forceinline__ void store_points(const T* keys, int64_t token_stride, int count, float scale, M* bounds) {
    constexpr int N = D / kWarp, kAtOnce = 8;
    const int lane = threadIdx.x % kWarp;
    const bool more = count > kAtOnce;
    if (more)
#pragma unroll 1
        for (int token = lane; token < count; token += kWarp)
#pragma unroll
            for (int c = 0; c < D; c += 64) prefetch(keys + token * token_stride + c);
    keys += lane * N;
    float deviation[kAtOnce][N], mean[N] = {}, axis[N] = {}, own[kAtOnce], dots[kAtOnce];
    auto load = [&](int first) {
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
            const auto key = *reinterpret_cast<const Elements<T, N>*>(keys + min(first + t, count - 1) * token_stride);
#pragma unroll
            for (int i = 0; i < N; ++i) deviation[t][i] = __fsub_rn(float(key.of[i]), mean[i]);
        }
    };
    // f(t, whether there is such a token), in the tokens' order, after `before`.
    auto for_each = [&](auto&& before, auto&& f) {
#pragma unroll 1
        for (int first = 0; first < count; first += kAtOnce) {
            if (more) load(first);
            before();
#pragma unroll
            for (int t = 0; t < kAtOnce; ++t) f(t, first + t < count);
        }
    };
    auto dots_with = [&](const float (&b)[N], float factor) {
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) own[t] = lane_dot_in_pairs(deviation[t], b);
        add_up_dots(dots, own);
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) dots[t] = __fmul_rn(dots[t], factor);
    };

    float sum[N] = {};
    if (!more) load(0);
    for_each([] {},
             [&](int t, bool exists) {
#pragma unroll
                 for (int i = 0; i < N; ++i) sum[i] = exists ? __fadd_rn(sum[i], deviation[t][i]) : sum[i];
             });
#pragma unroll
    for (int i = 0; i < N; ++i) mean[i] = __fdiv_rn(sum[i], float(count));
    if (!more)
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t)
#pragma unroll
            for (int i = 0; i < N; ++i) deviation[t][i] = __fsub_rn(deviation[t][i], mean[i]);

    float farthest = -1;
    for_each(
        [&] {
#pragma unroll
            for (int t = 0; t < kAtOnce; ++t) own[t] = lane_dot_in_pairs(deviation[t], deviation[t]);
            add_up_dots(dots, own);
        },
        [&](int t, bool exists) {
            const bool farther = exists && (farthest < 0 || dots[t] > farthest);
            farthest = farther ? dots[t] : farthest;
#pragma unroll
            for (int i = 0; i < N; ++i) axis[i] = farther ? deviation[t][i] : axis[i];
        });
    const bool deviates = farthest >= FLT_MIN;
    const float length = __fsqrt_rn(farthest);

#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = 0;
    for_each([&] { dots_with(axis, deviates ? __frcp_rn(farthest) : 0); },
             [&](int t, bool exists) {
#pragma unroll
                 for (int i = 0; i < N; ++i)
                     sum[i] = exists ? __fadd_rn(sum[i], __fmul_rn(deviation[t][i], dots[t])) : sum[i];
             });
    const float square = dot_in_pairs(sum, sum), inverse = square > 0 ? __frcp_rn(__fsqrt_rn(square)) : 0;
#pragma unroll
    for (int i = 0; i < N; ++i) axis[i] = __fmul_rn(sum[i], inverse);

    float fourths[2] = {};
    for_each([&] { dots_with(axis, deviates ? __frcp_rn(length) : 0); },
             [&](int t, bool exists) {
                 const float twice = __fmul_rn(dots[t], dots[t]), fourth = exists ? __fmul_rn(twice, twice) : 0;
                 fourths[0] = __fadd_rn(fourths[0], dots[t] > 0 ? 0 : fourth);
                 fourths[1] = __fadd_rn(fourths[1], dots[t] > 0 ? fourth : 0);
             });
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
