// What every kernel uses: 16-byte loads, the m16n8k16 product, NaN-keeping maxima, launch overlap, page lookup.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../params.h"
#include "../plan.h"

namespace quest::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The element type of metadata in 4 bits a number (params.h).
struct FourBits {
    uint8_t byte;
};

// From page to page, in the metadata's elements.
template <class M, int D>
constexpr int kPageElements = std::is_same_v<M, FourBits> ? D + D / 8 : 2 * D;

template <class T>
struct Packed;  // two elements in 32 bits
template <>
struct Packed<half> {
    using Pair = half2;
    static __device__ float2 to_floats(half2 x) { return __half22float2(x); }
    static __device__ half2 from_floats(float a, float b) { return __floats2half2_rn(a, b); }
    static __device__ half from_float(float x) { return __float2half_rn(x); }
};
template <>
struct Packed<__nv_bfloat16> {
    using Pair = __nv_bfloat162;
    static __device__ float2 to_floats(__nv_bfloat162 x) { return __bfloat1622float2(x); }
    static __device__ __nv_bfloat162 from_floats(float a, float b) { return __floats2bfloat162_rn(a, b); }
    static __device__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
};

template <class To, class From>
__device__ __forceinline__ To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To y;
    memcpy(&y, &x, sizeof(To));
    return y;
}

// Into L2.
__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Rows of a cache are read once: keep them out of L1. Not .nc: a kernel may start before its predecessor has written
// them.
__device__ __forceinline__ uint4 load_streaming(const void* address) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

__device__ __forceinline__ uint2 load_streaming_pair(const void* address) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
    return v;
}

// C += A B with A [16, 16] row-major, B [16, 8], float32 accumulators. Lane (g = lane / 4, t = lane % 4) holds of A:
// a0 (row g, columns 2t, 2t+1), a1 (row g+8, same), a2 (row g, columns 2t+8, 2t+9), a3 (row g+8, same); of B: b0 (rows
// 2t, 2t+1, column g), b1 (rows 2t+8, 2t+9, column g); of C: c0, c1 (row g, columns 2t, 2t+1), c2, c3 (row g+8, same).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A dot product does not care about the order of channels. Lane (g, t) loads channels 32 c + 8 t .. + 7 of its row:
// four pairs, which serve as the A (or B) registers of two products of 16 channels each. They add to sums of their own:
// a product waits for the one before it in the same sum.
template <class T>
__device__ __forceinline__ void multiply_32_channels(float (&c)[2][4], const uint4& row_g, const uint4& row_g8,
                                                     const uint4& column) {
    mma_m16n8k16<T>(c[0], row_g.x, row_g8.x, row_g.y, row_g8.y, column.x, column.y);
    mma_m16n8k16<T>(c[1], row_g.z, row_g8.z, row_g.w, row_g8.w, column.z, column.w);
}

// Transposes an 8x8 matrix of 16-bit elements spread over a warp, a pair a lane.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// 2^x; below 2^-126 it is 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Of a positive normal number.
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float max_keep_nan(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

// Programmatic dependent launch: a kernel may start while its predecessor drains, and reads nothing before it has
// waited, but for what team_guess.cuh says.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ int log2_of(int power_of_two) { return 31 - __clz(power_of_two); }

// A request's pages, without divisions: they would cost more than the loads they lead to.
struct PageTable {
    const int32_t* blocks;
    int page_shift, pages_per_block, max_pages;
    uint32_t reciprocal;

    __device__ __forceinline__ PageTable(const Paging& p, int64_t request)
        : blocks(p.block_table + request * p.table_stride),
          page_shift(log2_of(p.page_size)),
          pages_per_block(p.pages_per_block),
          max_pages(p.max_blocks * p.pages_per_block),
          reciprocal(p.reciprocal) {}

    // A row's length clamped to the table, and how many pages that is.
    __device__ __forceinline__ int visible(int seq_len) const { return min(max(seq_len, 0), max_pages << page_shift); }
    __device__ __forceinline__ int pages(int tokens) const { return (tokens + (1 << page_shift) - 1) >> page_shift; }

    // Brings the block numbers into L1 by all threads of the block, one line each. Not worth it where there are many.
    __device__ __forceinline__ void prefetch() const {
        constexpr int kEntries = 32;  // a line of 128 bytes
#pragma unroll 1
        for (int i = threadIdx.x * kEntries; i < entry(max_pages); i += blockDim.x * kEntries)
            asm volatile("prefetch.global.L1 [%0];" ::"l"(blocks + i));
    }

    // Page i is part i % M of block i / M. Exact for every page number: they stay under 2^28.
    __device__ __forceinline__ int entry(int page) const { return reciprocal == 0 ? page : __umulhi(page, reciprocal); }
    __device__ __forceinline__ int part(int page) const { return page - entry(page) * pages_per_block; }
    __device__ __forceinline__ int block(int page) const { return blocks[entry(page)]; }
};

template <class T>
__device__ __forceinline__ void store_four(T* to, const float4& v) {
    using Pair = typename Packed<T>::Pair;
    const Pair pairs[2] = {Packed<T>::from_floats(v.x, v.y), Packed<T>::from_floats(v.z, v.w)};
    *reinterpret_cast<uint2*>(to) = {bits_as<uint32_t>(pairs[0]), bits_as<uint32_t>(pairs[1])};
}

// Strides within a cache stay below 2^32 bytes (checked on the host), so an offset is one multiplication of 32 bits.
template <class T>
__device__ __forceinline__ uint32_t bytes_of(int64_t stride) {
    return static_cast<uint32_t>(stride) * static_cast<uint32_t>(sizeof(T));
}
__device__ __forceinline__ const char* offset(const char* base, uint32_t index, uint32_t stride) {
    return base + uint64_t(index) * stride;
}

template <class T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int64_t row, int64_t head) {
    return static_cast<const T*>(rows.data) + row * rows.row_stride + head * rows.head_stride;
}

// This lane's part of a head's query: channels 32 c + 8 t .. + 7 for each c.
template <class T, int D>
__device__ __forceinline__ void load_query(uint4 (&query)[D / 32], const T* head) {
#pragma unroll
    for (int c = 0; c < D / 32; ++c) query[c] = *reinterpret_cast<const uint4*>(head + 32 * c + threadIdx.x % 4 * 8);
}

// Launches so that the kernel may overlap its predecessor, where the chip has that. `gang`: all blocks at once or none
// (cooperative).
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Chip chip,
                   cudaStream_t stream, bool gang, Args&&... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute attributes[2]{};
    config.attrs = attributes;
    if (overlaps_launches(chip)) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (gang) {
        attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
        attributes[config.numAttrs++].val.cooperative = 1;
    }
    return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

// Calls f with the element type and head dim as types: the one place where they are chosen, but for narrow metadata.
template <class F>
cudaError_t dispatch(DType dtype, int head_dim, F&& f) {
    auto by_dim = [&](auto element) -> cudaError_t {
        switch (head_dim) {
            case 64: return f(element, std::integral_constant<int, 64>{});
            case 128: return f(element, std::integral_constant<int, 128>{});
            case 256: return f(element, std::integral_constant<int, 256>{});
            default: return cudaErrorInvalidValue;
        }
    };
    switch (dtype) {
        case DType::kFloat16: return by_dim(half{});
        case DType::kBFloat16: return by_dim(__nv_bfloat16{});
        default: return cudaErrorInvalidValue;
    }
}
template <class T, class F>
cudaError_t dispatch_metadata(DType dtype, T element, F&& f) {
    return dtype == DType::kInt4 ? f(FourBits{}) : dtype == DType::kFloat8E4M3 ? f(__nv_fp8_e4m3{}) : f(element);
}

}  // namespace quest::cuda
