// What the kernels share. All of it is in the instruction set's namespace: of a function common to them that is not
// inlined the linker would keep one copy, and a plain machine might run the AVX-512 one. So no std containers here.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "kernel_table.h"
#include "vec.h"

namespace quest::cpu::QUEST_CPU_ISA {

void append_paged_kv(const AppendParams& p);
void update_page_metadata(const UpdateParams& p);
void estimate_page_scores(const EstimateParams& p);
void select_topk_pages(const SelectParams& p);
void sparse_decode_attention(const AttentionParams& p);

constexpr int kMaxHeadDim = 256;

// Calls f with a value of the dtype's element type.
template <typename F>
void with_dtype(DType dtype, F f) {
    switch (dtype) {
        case DType::kFloat32: return f(float{});
        case DType::kFloat16: return f(Half{});
        case DType::kBFloat16: return f(BFloat16{});
        case DType::kFloat8E4M3:
        case DType::kInt4: return;  // metadata only: the ops refuse it elsewhere
    }
}

// Calls f with values of the dtype's and the metadata's element types.
template <typename F>
void with_dtypes(DType dtype, DType metadata, F f) {
    with_dtype(dtype, [&](auto element) {
        switch (metadata) {
            case DType::kFloat8E4M3: return f(element, Float8E4M3{});
            case DType::kInt4: return f(element, PackedInt4{});
            default: return f(element, element);
        }
    });
}

// Uninitialised memory for plain values.
template <typename T>
class Scratch {
public:
    explicit Scratch(int64_t count) : data_(static_cast<T*>(std::malloc(sizeof(T) * (count > 0 ? count : 1)))) {
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T& operator[](int64_t i) { return data_[i]; }
    T* data() { return data_; }

private:
    T* data_;
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tokens of a row: at least none, at most what its block table holds.
static inline int64_t clamp_length(int64_t length, int64_t max_pages, int64_t page_size) {
    const int64_t table_tokens = max_pages * page_size;
    return length < 0 ? 0 : length < table_tokens ? length : table_tokens;
}

// How many items a thread takes at least, so that starting it (microseconds) is worth it.
static inline int64_t grain_for(int64_t bytes_per_item) {
    constexpr int64_t kBytesPerThread = 64 * 1024;
    return ceil_div(kBytesPerThread, bytes_per_item < 1 ? 1 : bytes_per_item);
}

template <typename T>
inline T* at(void* data, int64_t elements) {
    return static_cast<T*>(data) + elements;
}

// Elements of one page and KV head's metadata.
template <typename Bound>
constexpr int page_elements(int head_dim) {
    return std::is_same_v<Bound, PackedInt4> ? packed_page_bytes(head_dim) : 2 * head_dim;
}

// [2, D]: lo, hi of one page and KV head; in 4 bits [packed_page_bytes(D)].
template <typename Bound>
inline Bound* page_bounds(const Metadata& m, int64_t block, int64_t head, int64_t part, int head_dim) {
    return at<Bound>(m.data, block * m.block_stride + head * m.head_stride + part * page_elements<Bound>(head_dim));
}

template <typename T>
inline void prefetch_row(const T* row, int count) {
    constexpr int kLine = 64;
    const char* bytes = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < int64_t(count) * int64_t(sizeof(T)); i += kLine) __builtin_prefetch(bytes + i);
}

}  // namespace quest::cpu::QUEST_CPU_ISA
