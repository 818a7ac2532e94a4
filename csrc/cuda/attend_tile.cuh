// Attention of one warp, 16 tokens at a time: S = K q^T and O^T += V^T P on tensor cores. K and V go from global memory
// straight into registers, so any strides will do and nothing is staged in shared memory. Up to 8 query heads share the
// keys: the columns of the mma.
#pragma once
#include "device.cuh"

namespace quest::cuda {

constexpr int kGroupHeads = 8;

// Eight tokens that lie in one page: its block, the first token's place in the block, and how many of them the row
// sees.
struct Run {
    int block, offset, valid;
};

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// This lane's part of two runs of keys and values. Lane (g, t) holds keys of token g of each run, and values of tokens
// 2 t, 2 t + 1.
template <class T, int D>
struct TokenTile {
    uint4 key[2][D / 32], value[2][2][D / 64];
    int valid[2];

    // `keys`, `values`: of the KV head, in block 0. The key of a token that the row does not see is another one: its
    // score is not used.
    __device__ __forceinline__ void load_keys(const Pool& pool, const T* keys, const Run (&runs)[2]) {
        const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            valid[h] = runs[h].valid;
            const int token = runs[h].offset + max(min(g, valid[h] - 1), 0);
            const T* from = keys + runs[h].block * pool.block_stride + token * pool.token_stride + 8 * t;
#pragma unroll
            for (int c = 0; c < D / 32; ++c) key[h][c] = load_streaming(from + 32 * c);
        }
    }
    // Its value is zero: so is its weight, and 0 * NaN would not be.
    __device__ __forceinline__ void load_values(const Pool& pool, const T* values, const Run (&runs)[2]) {
        const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
        const bool all = valid[0] == 8 && valid[1] == 8;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const T* from =
                values + runs[h].block * pool.block_stride + (runs[h].offset + 2 * t) * pool.token_stride + 8 * g;
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < D / 64; ++j) {
                    if (!all) value[h][i][j] = uint4{};
                    if (all || 2 * t + i < valid[h])
                        value[h][i][j] = load_streaming(from + i * pool.token_stride + 64 * j);
                }
        }
    }
};

// The running softmax of a warp; scores are in base 2.
template <class T, int D>
struct OnlineSoftmax {
    float out[D / 64][4][4] = {};  // O^T: channels 64 j + 8 g + 2 i + {0, 1} of heads 2 t + {0, 1}
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // of heads 2 t + {0, 1}; sum: of this lane's tokens

    // S of tokens g, g + 8 and heads 2 t, 2 t + 1. `query`: channels 32 c + 8 t .. of head g, for each c.
    __device__ __forceinline__ void scores_of(float (&score)[4], const TokenTile<T, D>& tile,
                                              const uint4 (&query)[D / 32], float scale) const {
        const int g = threadIdx.x % kWarp / 4;
        float sums[2][4] = {};
#pragma unroll
        for (int c = 0; c < D / 32; ++c) multiply_32_channels<T>(sums, tile.key[0][c], tile.key[1][c], query[c]);
#pragma unroll
        for (int i = 0; i < 4; ++i) score[i] = g < tile.valid[i / 2] ? (sums[0][i] + sums[1][i]) * scale : -INFINITY;
    }

    __device__ __forceinline__ void add(const float (&score)[4], const TokenTile<T, D>& tile) {
        float shrink[2], base[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float tile_top = fmaxf(score[i], score[i + 2]);
#pragma unroll
            for (int step = 4; step < kWarp; step *= 2)
                tile_top = fmaxf(tile_top, __shfl_xor_sync(kAllLanes, tile_top, step));
            const float new_top = fmaxf(top[i], tile_top);
            base[i] = new_top == -INFINITY ? 0.f : new_top;
            shrink[i] = exp2f(top[i] - base[i]);
            top[i] = new_top;
            sum[i] *= shrink[i];
        }
        uint32_t weights[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float w0 = exp2f(score[2 * h] - base[0]), w1 = exp2f(score[2 * h + 1] - base[1]);
            sum[0] += w0;
            sum[1] += w1;
            weights[h] = transpose_8x8(bits_as<uint32_t>(Packed<T>::from_floats(w0, w1)));
        }
#pragma unroll
        for (int j = 0; j < D / 64; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float (&o)[4] = out[j][i];
                o[0] *= shrink[0], o[1] *= shrink[1], o[2] *= shrink[0], o[3] *= shrink[1];
                const uint32_t v0 = word(tile.value[0][0][j], i), v1 = word(tile.value[0][1][j], i);
                const uint32_t v2 = word(tile.value[1][0][j], i), v3 = word(tile.value[1][1][j], i);
                // Rows g are the even channels of the pairs, rows g + 8 the odd ones; columns are tokens.
                mma_m16n8k16<T>(o, __byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632),
                                __byte_perm(v2, v3, 0x5410), __byte_perm(v2, v3, 0x7632), weights[0], weights[1]);
            }
    }
};

// A block's warps write their softmaxes here, then any thread sums them.
template <int D, int kWarps>
struct WarpPartials {
    float (&top)[kWarps][kGroupHeads], (&sum)[kWarps][kGroupHeads];
    float* out;  // [kWarps, group, D]
    int group;

    template <class T>
    __device__ __forceinline__ void store(OnlineSoftmax<T, D>& softmax, int warp) {
        const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int head = 2 * t + i;
#pragma unroll
            for (int step = 4; step < kWarp; step *= 2)
                softmax.sum[i] += __shfl_xor_sync(kAllLanes, softmax.sum[i], step);
            if (head >= group) continue;
            if (g == 0) top[warp][head] = softmax.top[i], sum[warp][head] = softmax.sum[i];
#pragma unroll
            for (int j = 0; j < D / 64; ++j)
#pragma unroll
                for (int pair = 0; pair < 4; ++pair)
                    *reinterpret_cast<float2*>(out + (warp * group + head) * D + 64 * j + 8 * g + 2 * pair) = {
                        softmax.out[j][pair][i], softmax.out[j][pair][i + 2]};
        }
    }

    // Four channels of a head over all warps: the weighted sum of values, in *total of weights, both relative to
    // 2^*base.
    __device__ __forceinline__ float4 add_up(int head, int channel, float* base, float* total) const {
        float highest = -INFINITY, weights = 0.f;
        float4 o{0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, top[w][head]);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float weight =
                top[w][head] == -INFINITY ? 1.f : exp2f(top[w][head] - highest);  // no tokens: zeros, or NaN
            const float4 part = *reinterpret_cast<const float4*>(out + (w * group + head) * D + channel);
            weights += weight * sum[w][head];
            o.x += weight * part.x, o.y += weight * part.y, o.z += weight * part.z, o.w += weight * part.w;
        }
        *base = highest, *total = weights;
        return o;
    }
};

}  // namespace quest::cuda
