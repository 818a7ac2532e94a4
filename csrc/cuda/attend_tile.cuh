// Attention of one warp, 16 tokens at a time: S = K q^T and O^T += V^T P on tensor cores. K and V go from global memory
// straight into registers, so any strides will do and nothing is staged in shared memory. Up to 8 query heads share the
// keys: the columns of the mma.
#pragma once
#include "device.cuh"

namespace quest::cuda {

constexpr int kGroupHeads = 8;

// Eight tokens, and the page that they lie in: its block, the first token's place in the block, how many of them the
// row sees, and whether the last of these is the step's own, which may not be in the cache yet. Of pages of 4, two of
// which make a run, each lane has the one that its token lies in, as if the other's tokens were of that page as well.
struct Run {
    int block, offset, valid;
    bool own = false;
};

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Where a KV head's rows lie: this lane's part of them, and how far apart they are, in bytes.
template <class T>
struct HeadRows {
    const char* data;
    uint32_t block, token;

    __device__ __forceinline__ HeadRows(const Pool& pool, int kv_head, int lane_offset)
        : data(static_cast<const char*>(pool.data) + (kv_head * pool.head_stride + lane_offset) * int64_t(sizeof(T))),
          block(bytes_of<T>(pool.block_stride)),
          token(bytes_of<T>(pool.token_stride)) {}

    __device__ __forceinline__ const char* at(int block_index, int token_index) const {
        return offset(offset(data, block_index, block), token_index, token);
    }
};

// Where in a run of two pages of 4 the one begins that a token of it lies in; 0 for larger pages.
__device__ __forceinline__ int page_in_run(int page_shift, int token) { return page_shift == 2 ? token & 4 : 0; }

struct NotOwn {  // where no run has a token of the step's own
    __device__ const char* operator()() const { return nullptr; }
};

// This lane's part of two runs of keys and values. Lane (g, t) holds keys of token g of each run, and values of tokens
// 2 t, 2 t + 1.
template <class T, int D>
struct TokenTile {
    uint4 key[2][D / 32], value[2][2][D / 64];
    int valid[2];

    // Where this lane's part of a key or value begins.
    static __device__ __forceinline__ int key_channel() { return threadIdx.x % 4 * 8; }
    static __device__ __forceinline__ int value_channel() { return threadIdx.x % kWarp / 4 * 8; }
    static __device__ __forceinline__ HeadRows<T> keys_of(const AttentionParams& p, int kv_head) {
        return {p.k_cache, kv_head, key_channel()};
    }
    static __device__ __forceinline__ HeadRows<T> values_of(const AttentionParams& p, int kv_head) {
        return {p.v_cache, kv_head, value_channel()};
    }

    // The key of a token that the row does not see is another one: its score is not used. own(): the step's own key,
    // this lane's part.
    template <class Own = NotOwn>
    __device__ __forceinline__ void load_keys(const HeadRows<T>& keys, const Run (&runs)[2], Own&& own = {}) {
        const int g = threadIdx.x % kWarp / 4;
        valid[0] = runs[0].valid, valid[1] = runs[1].valid;
        const char* from[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            from[h] = keys.at(runs[h].block, runs[h].offset + max(min(g, valid[h] - 1), 0));
            if (runs[h].own && g >= valid[h] - 1) from[h] = own();
        }
        load_keys(from);
    }
    // Its value is zero: so is its weight, and 0 * NaN would not be. own(): as above, a value.
    template <class Own = NotOwn>
    __device__ __forceinline__ void load_values(const HeadRows<T>& values, const Run (&runs)[2], Own&& own = {}) {
        const int t = threadIdx.x % 4;
        const char* from[2] = {values.at(runs[0].block, runs[0].offset + 2 * t),
                               values.at(runs[1].block, runs[1].offset + 2 * t)};
        if (runs[0].valid == 8 && runs[1].valid == 8 && !runs[0].own && !runs[1].own)
            return load_values(from, values.token);
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const char* row = from[h] + (i == 0 ? 0 : values.token);
                if (runs[h].own && 2 * t + i == runs[h].valid - 1) row = own();
#pragma unroll
                for (int j = 0; j < D / 64; ++j) {
                    value[h][i][j] = uint4{};
                    if (2 * t + i < runs[h].valid) value[h][i][j] = load_streaming(row + 128 * j);
                }
            }
    }
    // Both where the row sees all 16 tokens and none is the step's own.
    __device__ __forceinline__ void load_whole(const HeadRows<T>& keys, const HeadRows<T>& values, const Run (&runs)[2],
                                               const Run (&value_runs)[2]) {
        const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
        valid[0] = valid[1] = 8;
        load_keys({keys.at(runs[0].block, runs[0].offset + g), keys.at(runs[1].block, runs[1].offset + g)});
        load_values({values.at(value_runs[0].block, value_runs[0].offset + 2 * t),
                     values.at(value_runs[1].block, value_runs[1].offset + 2 * t)},
                    values.token);
    }

private:
    __device__ __forceinline__ void load_keys(const char* const (&from)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int c = 0; c < D / 32; ++c) key[h][c] = load_streaming(from[h] + 64 * c);
    }
    __device__ __forceinline__ void load_values(const char* const (&from)[2], uint32_t token_bytes) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < D / 64; ++j)
                    value[h][i][j] = load_streaming(from[h] + (i == 0 ? 0 : token_bytes) + 128 * j);
    }
};

// The running softmax of a warp; scores are in base 2.
template <class T, int D>
struct OnlineSoftmax {
    float out[D / 64][4][4] = {};  // O^T: channels 64 j + 8 g + 2 i + {0, 1} of heads 2 t + {0, 1}
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // of heads 2 t + {0, 1}; sum: of this lane's tokens

    // S of tokens g, g + 8 and heads 2 t, 2 t + 1. query(c): channels 32 c + 8 t .. of head g.
    template <class Query>
    static __device__ __forceinline__ void scores_of(float (&score)[4], const TokenTile<T, D>& tile, Query&& query,
                                                     float scale) {
        const int g = threadIdx.x % kWarp / 4;
        float sums[2][4] = {};
#pragma unroll
        for (int c = 0; c < D / 32; ++c) multiply_32_channels<T>(sums, tile.key[0][c], tile.key[1][c], query(c));
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
            shrink[i] = exp2_fast(top[i] - base[i]);
            top[i] = new_top;
            sum[i] *= shrink[i];
        }
        uint32_t weights[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float w0 = exp2_fast(score[2 * h] - base[0]), w1 = exp2_fast(score[2 * h + 1] - base[1]);
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

// A block's warps write their softmaxes here, then any thread sums them. Pairs of heads lie apart by a few words more
// than their size, so that the eight lanes that write 16 bytes each at once meet different banks.
template <int D>
__host__ __device__ constexpr int head_offset(int head) {
    return head * D + head / 2 * 16 + head / 4 * 4;
}

template <int kWarps>
struct alignas(16) WarpSums {
    float top[kGroupHeads][kWarps], sum[kGroupHeads][kWarps];
};

template <int D, int kWarps>
struct WarpPartials {
    WarpSums<kWarps>& sums;
    float* out;  // [kWarps, head_offset(group)]
    int group;

    __device__ __forceinline__ float* out_of(int warp, int head) const {
        return out + warp * head_offset<D>(group) + head_offset<D>(head);
    }

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
            if (g == 0) sums.top[head][warp] = softmax.top[i], sums.sum[head][warp] = softmax.sum[i];
#pragma unroll
            for (int j = 0; j < D / 64; ++j)
#pragma unroll
                for (int pair = 0; pair < 4; pair += 2)
                    *reinterpret_cast<float4*>(out_of(warp, head) + 64 * j + 8 * g + 2 * pair) = {
                        softmax.out[j][pair][i], softmax.out[j][pair][i + 2], softmax.out[j][pair + 1][i],
                        softmax.out[j][pair + 1][i + 2]};
        }
    }

    // Four channels of a head over all warps: the weighted sum of values, in *total of weights, both relative to
    // 2^*base.
    __device__ __forceinline__ float4 add_up(unsigned head, unsigned channel, float* base, float* total) const {
        float top[kWarps], sum[kWarps];
#pragma unroll
        for (int w = 0; w < kWarps; w += 4) {
            *reinterpret_cast<float4*>(top + w) = *reinterpret_cast<const float4*>(&sums.top[head][w]);
            *reinterpret_cast<float4*>(sum + w) = *reinterpret_cast<const float4*>(&sums.sum[head][w]);
        }
        float highest = top[0], weights = 0.f;
        float4 o{0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, top[w]);
        const float shift = highest == -INFINITY ? 0.f : highest;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float weight = exp2_fast(top[w] - shift);
            const float4 part = *reinterpret_cast<const float4*>(out_of(w, head) + channel);
            weights += weight * sum[w];
            o.x += weight * part.x, o.y += weight * part.y, o.z += weight * part.z, o.w += weight * part.w;
        }
        *base = highest, *total = weights;
        return o;
    }
};

}  // namespace quest::cuda
