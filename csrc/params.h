// One params struct an op: what the torch side hands to a CPU or CUDA kernel. No torch types, so that kernels compile
// without torch headers. Strides count elements; the last dimension of every tensor is contiguous.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace quest {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kInt4 };
constexpr int bits_of(DType dtype) {
    return dtype == DType::kInt4 ? 4 : dtype == DType::kFloat8E4M3 ? 8 : dtype == DType::kFloat32 ? 32 : 16;
}
enum class HeadReduction : int32_t { kMax, kMean, kNone };
enum class BoundKind : int32_t { kMinMax, kCuboid, kMeanStd, kPrincipal };

// What the two vectors of a page are: minimum and maximum of its keys, mean -+ scale * mean absolute deviation
// (kCuboid) or standard deviation (kMeanStd), or two points (kPrincipal): mean -+ scale * deviation along one axis.
struct BoundRule {
    BoundKind kind;
    float scale;
};

// A page's two vectors in 4 bits: codes of lo, codes of hi, scales of lo, scales of hi. A scale, in float16, serves 32
// channels, and a channel is its code - 8, 1 to 15, times that. The codes of channels 32 c + 8 t + i, i from 0 to 7,
// are word packed_word(D, c, t) of their vector, code i at its bits packed_shift(i): so that a lane of a GPU's warp
// loads its part of a row of mma operands at once, and takes two numbers of 16 bits out of a word by a mask.
constexpr int kScaledChannels = 32;
constexpr int packed_page_bytes(int head_dim) { return head_dim + head_dim / 8; }
QUEST_HOST_DEVICE constexpr int packed_word(int head_dim, int c, int t) {
    const int together = head_dim < 128 ? head_dim / kScaledChannels : 4;
    return c / together * 4 * together + t * together + c % together;
}
QUEST_HOST_DEVICE constexpr int packed_shift(int i) { return i % 2 * 16 + i / 2 * 4; }
constexpr float kLargestCode = 7;

// [num_blocks, S, Hkv, D]
struct Pool {
    void* data;
    int64_t block_stride, token_stride, head_stride;
};

// [num_blocks, Hkv, M, 2, D], or, in 4 bits, [num_blocks, Hkv, M, packed_page_bytes(D)]; the part of a block and head
// is contiguous.
struct Metadata {
    void* data;
    int64_t block_stride, head_stride;
    DType dtype;          // the cache's, kFloat8E4M3 or kInt4
    bool points = false;  // a page's score is that of the better of its two vectors
};

// [rows, heads, D]
struct Rows {
    void* data;
    int64_t row_stride, head_stride;
};

// Where a request's tokens lie. Page i is part i % pages_per_block of block block_table[b][i / pages_per_block].
struct Paging {
    const int32_t* block_table;  // [B, max_blocks]
    int64_t table_stride;
    int32_t max_blocks;
    int32_t page_size;
    int32_t pages_per_block;  // M
    uint32_t reciprocal;      // 2^32 / M rounded up, so that a kernel divides by multiplying; 0 where M is 1

    int32_t block_size() const { return page_size * pages_per_block; }  // S
    int32_t max_pages() const { return max_blocks * pages_per_block; }  // P
};

struct AppendParams {
    Rows key, value;  // [X, Hkv, D]
    Pool k_cache, v_cache;
    Metadata metadata;
    // [N]; slot = block * S + offset, negative: skip. Null, on a GPU: row i is the last of its seq_lens[i] tokens,
    // clamped to the block table of request i / rows_per_request; of no tokens: skip.
    const int64_t* slot_mapping;
    const int32_t* seq_lens;
    Paging paging;
    int32_t rows_per_request;
    int32_t num_tokens;  // N
    int32_t num_kv_heads, head_dim, page_size, pages_per_block;
    DType dtype;
    BoundRule bound;
};

struct UpdateParams {
    Pool k_cache;
    Metadata metadata;
    Paging paging;
    const int32_t* seq_lens;    // [B]
    const int32_t* start_lens;  // [B]
    int32_t num_requests;       // B
    int32_t num_kv_heads, head_dim;
    DType dtype;
    BoundRule bound;
};

struct EstimateParams {
    Rows query;  // [R, Hq, D]
    Metadata metadata;
    Paging paging;
    const int32_t* seq_lens;             // [R]
    float* scores;                       // [R, Hs, P]; Hs = Hkv, or Hq where head_reduction is kNone
    int32_t num_rows, rows_per_request;  // R, T
    int32_t num_q_heads, num_kv_heads, head_dim;
    HeadReduction head_reduction;
    DType dtype;
    bool fill_tail;  // write -inf past a row's last page; the chained ops never read there
    int32_t
        skip_pages;  // where positive: rows of at most this many pages need no scores, their selection is every page
};

struct SelectParams {
    const float* scores;          // [R, Hs, P]
    const int32_t* seq_lens;      // [R]
    const int32_t* page_budgets;  // [R, 1 or Hs] or null
    int32_t budget_heads;         // 1 or Hs
    int32_t* page_ids;            // [R, Hs, K]
    int32_t* page_counts;         // [R, Hs]
    int32_t num_rows, num_heads;  // R, Hs
    int32_t max_pages;            // P
    int32_t page_size, page_budget, sink_pages, recent_pages;
};

struct AttentionParams {
    Rows query;  // [R, Hq, D]
    Pool k_cache, v_cache;
    int32_t num_blocks;  // of the pools
    Paging paging;
    const int32_t* seq_lens;             // [R]
    const int32_t* page_ids;             // [R, Hi, K] ascending, or null: every page
    const int32_t* page_counts;          // [R, Hi] or null: up to the first -1
    int32_t id_heads, max_ids;           // Hi = 1, Hkv or Hq; K
    Rows out;                            // [R, Hq, D]
    float* lse;                          // [R, Hq], natural log
    int32_t num_rows, rows_per_request;  // R, T
    int32_t num_q_heads, num_kv_heads, head_dim;
    float sm_scale;
    DType dtype;
};

// quest_decode_attention in one launch: `attention` has no page ids.
struct FusedParams {
    AttentionParams attention;
    Metadata metadata;
    HeadReduction head_reduction;  // kMax or kMean
    const int32_t* page_budgets;   // [R, 1 or Hkv] or null
    int32_t budget_heads;
    int32_t page_budget, sink_pages, recent_pages;
    AppendParams append;  // of the rows' last tokens, in the same launch; num_tokens 0: nothing
};

}  // namespace quest
