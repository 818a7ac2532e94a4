// From torch arguments to the kernels' params: what the ops' tensors must be, each checked in one place.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "checks.h"

namespace quest {

inline DType dtype_of(const Arg& arg) {
    if (arg.dtype == ScalarType::Half) return DType::kFloat16;
    if (arg.dtype == ScalarType::BFloat16) return DType::kBFloat16;
    if (arg.dtype == ScalarType::Float && arg.tensor.is_cpu()) return DType::kFloat32;
    fail(arg.name, " must be float16 or bfloat16 (float32 on the CPU too), got ", name_of(arg.dtype), " on ",
         arg.device_text());
}

inline HeadReduction reduction_of(const std::string& name) {
    if (name == "max") return HeadReduction::kMax;
    if (name == "mean") return HeadReduction::kMean;
    if (name == "none") return HeadReduction::kNone;
    fail("head_reduction must be \"max\", \"mean\" or \"none\", got \"", name, "\"");
}

inline BoundRule bound_of(const std::string& name, double scale) {
    const float scale32 = static_cast<float>(scale);
    if (!(scale32 > 0) || !std::isfinite(scale32)) fail("bound_scale must be a positive float32 number, got ", scale);
    if (name == "cuboid") return {BoundKind::kCuboid, scale32};
    if (name == "mean_std") return {BoundKind::kMeanStd, scale32};
    if (name == "principal") return {BoundKind::kPrincipal, scale32};
    if (name != "minmax")
        fail("bound must be \"minmax\", \"cuboid\", \"mean_std\" or \"principal\", got \"", name, "\"");
    if (scale != 1) fail("bound_scale must be 1 for bound \"minmax\", got ", scale);
    return {BoundKind::kMinMax, 1.0f};
}

inline Rows rows_of(const Arg& a) { return {a.data(), a.stride_of(0), a.stride_of(1)}; }
inline Pool pool_of(const Arg& a) { return {a.data(), a.stride_of(0), a.stride_of(1), a.stride_of(2)}; }
inline Metadata metadata_of(const Arg& a) {
    return {a.data(), a.stride_of(0), a.stride_of(1),
            a.dtype == ScalarType::Float8_e4m3fn ? DType::kFloat8E4M3
            : a.dtype == ScalarType::Byte        ? DType::kInt4
                                                 : dtype_of(a)};
}

inline void check_page_size(int64_t page_size, int64_t pages_per_block) {
    expect_one_of("page_size", page_size, {4, 8, 16, 32, 64, 128});
    expect_range("pages_per_block (block size / page_size)", pages_per_block, 1, 8);
}

inline Arg cache_arg(const char* name, const Tensor& t) {
    Arg cache(name, t, {4}, "[num_blocks, block_size, num_kv_heads, head_dim]");
    cache.expect_aligned_rows();
    cache.expect_narrow_strides();
    expect_one_of("head_dim", cache.sizes[3], {64, 128, 256});
    return cache;
}

inline void check_values_like_keys(const Arg& k_cache, const Arg& v_cache) {
    v_cache.expect_device_of(k_cache);
    v_cache.expect_dtype(k_cache.dtype, " as k_cache");
    for (int64_t i = 0; i < 4; ++i) v_cache.expect_size(i, k_cache.sizes[i], "k_cache's");
}

// page_metadata [num_blocks, Hkv, 2, D] or [num_blocks, Hkv, M, 2, D], in 4 bits [num_blocks, Hkv, M,
// packed_page_bytes(D)]; returns M.
inline int32_t check_metadata(const Arg& metadata, int64_t head_dim) {
    const bool packed = metadata.dtype == ScalarType::Byte;
    const int64_t page = packed ? packed_page_bytes(static_cast<int>(head_dim)) : 2 * head_dim;  // elements
    if (packed && metadata.rank != 4)
        fail("page_metadata in uint8 (4 bits a number) must have shape [num_blocks, num_kv_heads, pages_per_block, ",
             page, "], got ", metadata.shape_text());
    metadata.expect_aligned_rows(packed && head_dim < 128 ? 8 : 16);
    metadata.expect_narrow_strides();
    const int64_t last = metadata.rank - 1;
    if (packed) {
        metadata.expect_size(last, page, "9 / 8 of head_dim, a page's bytes in 4 bits a number,");
    } else {
        metadata.expect_size(last, head_dim, "head_dim");
        metadata.expect_size(last - 1, 2, "the pair of bounds (lo, hi)");
    }
    const int64_t pages_per_block = packed || metadata.rank == 5 ? metadata.sizes[2] : 1;
    if ((!packed && metadata.strides[last - 1] != head_dim) || (pages_per_block > 1 && metadata.strides[2] != page))
        fail("page_metadata must be contiguous within a block and head, got strides [", join(metadata.tensor.strides()),
             "]");
    return narrow("pages_per_block", pages_per_block);
}

inline const char* const kMetadataShape =
    "[num_blocks, num_kv_heads, 2, head_dim] or [num_blocks, num_kv_heads, pages_per_block, 2, head_dim], in uint8 "
    "[num_blocks, num_kv_heads, pages_per_block, head_dim * 9 / 8]";

// Metadata has the dtype of what it stands beside, 8 bits or 4.
inline void check_metadata_dtype(const Arg& metadata, const Arg& beside) {
    metadata.expect_device_of(beside);
    if (metadata.dtype != beside.dtype && metadata.dtype != ScalarType::Float8_e4m3fn &&
        metadata.dtype != ScalarType::Byte)
        fail(metadata.name, " must be ", name_of(beside.dtype), " as ", beside.name,
             ", float8_e4m3fn, or uint8 (4 bits a number), got ", name_of(metadata.dtype));
}

inline void check_metadata_of_cache(const Arg& metadata, const Arg& k_cache) {
    check_metadata_dtype(metadata, k_cache);
    metadata.expect_size(0, k_cache.sizes[0], "k_cache's num_blocks");
    metadata.expect_size(1, k_cache.sizes[2], "k_cache's num_kv_heads");
}

inline int64_t page_size_of(const Arg& k_cache, int32_t pages_per_block) {
    if (pages_per_block < 1 || k_cache.sizes[1] % pages_per_block != 0)
        fail("k_cache has blocks of ", k_cache.sizes[1], " tokens, which page_metadata's ", pages_per_block,
             " pages a block do not divide");
    check_page_size(k_cache.sizes[1] / pages_per_block, pages_per_block);
    return k_cache.sizes[1] / pages_per_block;
}

inline Paging paging_of(const Arg& table, const Arg& beside, int64_t page_size, int64_t pages_per_block) {
    table.expect_dtype(ScalarType::Int);
    table.expect_device_of(beside);
    if (table.sizes[1] > 1 && table.strides[1] != 1)
        fail("block_table must be contiguous in its last dimension, got stride ", table.strides[1]);
    const int64_t pages = table.sizes[1] * pages_per_block;
    narrow("block_table's capacity in tokens", pages * page_size);
    return {table.data_as<const int32_t>(),
            table.stride_of(0),
            static_cast<int32_t>(table.sizes[1]),
            static_cast<int32_t>(page_size),
            static_cast<int32_t>(pages_per_block),
            pages_per_block == 1 ? 0 : static_cast<uint32_t>(UINT32_MAX / pages_per_block + 1)};
}

inline const int32_t* lengths_of(const Arg& lengths, int64_t expected, const char* meaning, const Arg& beside) {
    lengths.expect_dtype(ScalarType::Int);
    lengths.expect_device_of(beside);
    lengths.expect_size(0, expected, meaning);
    lengths.expect_contiguous();
    return lengths.data_as<const int32_t>();
}

// query [R, Hq, D] against Hkv heads and B requests; returns T.
inline int32_t check_query(const Arg& query, int64_t head_dim, int64_t num_kv_heads, int64_t num_requests) {
    query.expect_aligned_rows();
    query.expect_size(2, head_dim, "head_dim");
    if (num_kv_heads < 1 || query.sizes[1] < 1 || query.sizes[1] % num_kv_heads != 0)
        fail("query has ", query.sizes[1], " heads, not a multiple of the ", num_kv_heads, " KV heads");
    expect_range("query heads a KV head", query.sizes[1] / num_kv_heads, 1, 16);
    if (query.sizes[0] == 0 && num_requests == 0) return 1;
    if (num_requests < 1 || query.sizes[0] % num_requests != 0)
        fail("query has ", query.sizes[0], " rows, not a multiple of block_table's ", num_requests, " requests");
    const int64_t rows_per_request = query.sizes[0] / num_requests;
    if (query.sizes[0] > 0) expect_range("rows a request (query rows / block_table rows)", rows_per_request, 1, 8);
    return static_cast<int32_t>(rows_per_request > 0 ? rows_per_request : 1);
}

// On the CPU the values that address memory are looked at too; on a GPU that would cost a synchronisation, and
// QUEST_OPS_CHECK=1 asks for it (quest_ops/ops.py).
inline void check_table_values(const Paging& paging, int64_t num_requests, const int32_t* seq_lens,
                               int64_t rows_per_request, int64_t num_blocks) {
    for (int64_t b = 0; b < num_requests; ++b) {
        int64_t length = 0;
        for (int64_t t = 0; t < rows_per_request; ++t)
            length = std::max<int64_t>(length, seq_lens[b * rows_per_request + t]);
        const int64_t used =
            std::min<int64_t>((length + paging.block_size() - 1) / paging.block_size(), paging.max_blocks);
        for (int64_t i = 0; i < used; ++i) {
            const int32_t block = paging.block_table[b * paging.table_stride + i];
            if (block < 0 || block >= num_blocks)
                fail("block_table[", b, ", ", i, "] is ", block, ", but the cache has blocks 0..", num_blocks - 1,
                     " and seq_lens reach that entry");
        }
    }
}

inline void check_budget(int64_t page_budget, int64_t sink_pages, int64_t recent_pages) {
    expect_range("sink_pages", sink_pages, 0, INT32_MAX);
    expect_range("recent_pages", recent_pages, 1, INT32_MAX);  // 1: the page being written
    constexpr int64_t kMostPages = int64_t(1) << 29;           // of 4 tokens: 2^31 tokens
    expect_range("page_budget", page_budget, 1, kMostPages);
    if (page_budget < sink_pages + recent_pages + 1)
        fail("page_budget must hold sink_pages + recent_pages + 1 = ", sink_pages + recent_pages + 1, " pages, got ",
             page_budget);
}

// page_budgets [R] or [R, Hs] int32, contiguous; returns its pointer and sets how many heads it names.
inline const int32_t* budgets_of(const std::optional<Tensor>& budgets_, const Arg& beside, int64_t rows, int64_t heads,
                                 int32_t* budget_heads) {
    *budget_heads = 1;
    if (!budgets_) return nullptr;
    const Arg budgets("page_budgets", *budgets_, {1, 2}, "[rows] or [rows, heads]");
    budgets.expect_dtype(ScalarType::Int);
    budgets.expect_device_of(beside);
    budgets.expect_size(0, rows, "the number of rows");
    budgets.expect_contiguous();
    if (budgets.rank == 2) {
        budgets.expect_size(1, heads, "the number of selecting heads");
        *budget_heads = static_cast<int32_t>(heads);
    }
    return budgets.data_as<const int32_t>();
}

// All but where the tokens go.
inline AppendParams append_params(const Tensor& key_, const Tensor& value_, const Arg& k_cache, const Arg& v_cache,
                                  const Arg& metadata, BoundRule bound) {
    const Arg key("key", key_, {3}, "[tokens, num_kv_heads, head_dim]"),
        value("value", value_, {3}, "[tokens, num_kv_heads, head_dim]");
    const DType dtype = dtype_of(k_cache);
    check_values_like_keys(k_cache, v_cache);
    for (const Arg* cache : {&k_cache, &v_cache, &metadata}) cache->expect_no_overlap();
    for (const Arg* rows : {&key, &value}) {
        rows->expect_device_of(k_cache);
        rows->expect_dtype(k_cache.dtype, " as k_cache");
        rows->expect_aligned_rows();
        rows->expect_size(1, k_cache.sizes[2], "k_cache's num_kv_heads");
        rows->expect_size(2, k_cache.sizes[3], "head_dim");
    }
    value.expect_size(0, key.sizes[0], "key's number of rows");
    check_metadata_of_cache(metadata, k_cache);
    const int32_t pages_per_block = check_metadata(metadata, k_cache.sizes[3]);
    AppendParams params{};
    params.key = rows_of(key);
    params.value = rows_of(value);
    params.k_cache = pool_of(k_cache);
    params.v_cache = pool_of(v_cache);
    params.metadata = metadata_of(metadata);
    params.num_tokens = narrow("key's number of rows", key.sizes[0]);
    params.num_kv_heads = narrow("num_kv_heads", k_cache.sizes[2]);
    params.head_dim = narrow("head_dim", k_cache.sizes[3]);
    params.page_size = static_cast<int32_t>(page_size_of(k_cache, pages_per_block));
    params.pages_per_block = pages_per_block;
    params.dtype = dtype;
    params.bound = bound;
    return params;
}

inline EstimateParams estimate_params(const Arg& query, const Arg& metadata_, const Arg& table, const Arg& seq_lens,
                                      int64_t page_size, const std::string& reduction, BoundKind bound) {
    const DType dtype = dtype_of(query);
    expect_one_of("head_dim", query.sizes[2], {64, 128, 256});
    check_metadata_dtype(metadata_, query);
    const int32_t pages_per_block = check_metadata(metadata_, query.sizes[2]);
    check_page_size(page_size, pages_per_block);
    const int32_t rows_per_request = check_query(query, query.sizes[2], metadata_.sizes[1], table.sizes[0]);
    Metadata metadata = metadata_of(metadata_);
    metadata.points = bound == BoundKind::kPrincipal;
    return {rows_of(query),
            metadata,
            paging_of(table, query, page_size, pages_per_block),
            lengths_of(seq_lens, query.sizes[0], "query's number of rows", query),
            nullptr,
            narrow("rows", query.sizes[0]),
            rows_per_request,
            narrow("query heads", query.sizes[1]),
            narrow("num_kv_heads", metadata_.sizes[1]),
            narrow("head_dim", query.sizes[2]),
            reduction_of(reduction),
            dtype,
            true,
            0};
}

inline AttentionParams attention_params(const Arg& query, const Arg& k_cache, const Arg& v_cache, const Arg& table,
                                        const Arg& seq_lens, int64_t page_size, int64_t pages_per_block,
                                        std::optional<double> sm_scale) {
    const DType dtype = dtype_of(query);
    k_cache.expect_device_of(query);
    k_cache.expect_dtype(query.dtype, " as query");
    check_values_like_keys(k_cache, v_cache);
    const int32_t rows_per_request = check_query(query, k_cache.sizes[3], k_cache.sizes[2], table.sizes[0]);
    if (sm_scale && !std::isfinite(static_cast<float>(*sm_scale)))
        fail("sm_scale must be None or a finite float32 number, got ", *sm_scale);
    return {rows_of(query),
            pool_of(k_cache),
            pool_of(v_cache),
            narrow("num_blocks", k_cache.sizes[0]),
            paging_of(table, query, page_size, pages_per_block),
            lengths_of(seq_lens, query.sizes[0], "query's number of rows", query),
            nullptr,
            nullptr,
            1,
            0,
            {},
            nullptr,
            narrow("rows", query.sizes[0]),
            rows_per_request,
            narrow("query heads", query.sizes[1]),
            narrow("num_kv_heads", k_cache.sizes[2]),
            narrow("head_dim", query.sizes[2]),
            static_cast<float>(sm_scale ? *sm_scale : 1.0 / std::sqrt(double(query.sizes[2]))),
            dtype};
}

// The caller's out and lse, checked, or fresh ones.
inline void bind_output(AttentionParams& params, const Arg& query, const Tensor& out_, const Tensor& lse_) {
    const Arg out("out", out_, {3}, "[rows, num_q_heads, head_dim]"), lse("lse", lse_, {2}, "[rows, num_q_heads]");
    out.expect_dtype(query.dtype, " as query");
    lse.expect_dtype(ScalarType::Float);
    for (int64_t i = 0; i < 3; ++i) out.expect_size(i, query.sizes[i], "query's");
    for (int64_t i = 0; i < 2; ++i) lse.expect_size(i, query.sizes[i], "query's");
    for (const Arg* arg : {&out, &lse}) {
        arg->expect_device_of(query);
        arg->expect_no_overlap();
    }
    out.expect_aligned_rows();
    lse.expect_contiguous();
    params.out = rows_of(out);
    params.lse = static_cast<float*>(lse.data());
}

inline void check_workspace(const std::optional<Tensor>& workspace_, const Arg& query) {
    if (!workspace_) return;
    const Arg workspace("workspace", *workspace_, {1}, "[bytes]");
    workspace.expect_dtype(ScalarType::Byte);
    workspace.expect_device_of(query);
    workspace.expect_aligned_rows();
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace quest
