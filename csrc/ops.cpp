// The torch side: every schema, the checks, and the dispatch to CPU or CUDA kernels. Built on the LibTorch Stable ABI
// (target 2.10), so that one library runs under every later torch and any Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <functional>
#include <optional>
#include <string>
#include <tuple>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cuda_dispatch.h"
#include "quest_decode.h"

namespace quest {

namespace cpu {
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
    torch::stable::parallel_for(0, count, grain, f);
}
}  // namespace cpu

namespace {

void append_paged_kv(Tensor key, Tensor value, Tensor k_cache_, Tensor v_cache_, Tensor metadata_, Tensor slots_,
                     std::string bound, double bound_scale) {
    const Arg k_cache = cache_arg("k_cache", k_cache_), v_cache = cache_arg("v_cache", v_cache_);
    const Arg metadata("page_metadata", metadata_, {4, 5}, kMetadataShape),
        slots("slot_mapping", slots_, {1}, "[tokens]");
    AppendParams params = append_params(key, value, k_cache, v_cache, metadata, bound_of(bound, bound_scale));
    slots.expect_dtype(ScalarType::Long);
    slots.expect_device_of(k_cache);
    slots.expect_contiguous();
    if (slots.sizes[0] > params.num_tokens)
        fail("slot_mapping has ", slots.sizes[0], " entries, but key has only ", params.num_tokens, " rows");
    params.slot_mapping = slots.data_as<const int64_t>();
    params.num_tokens = static_cast<int32_t>(slots.sizes[0]);
    if (params.num_tokens == 0 || params.num_kv_heads == 0) return;
    if (k_cache.tensor.is_cuda()) return cuda::append_paged_kv(params, k_cache.tensor.get_device_index());
    const int64_t capacity = k_cache.sizes[0] * k_cache.sizes[1];
    for (int32_t i = 0; i < params.num_tokens; ++i)
        if (params.slot_mapping[i] >= capacity)
            fail("slot_mapping[", i, "] is ", params.slot_mapping[i], ", but the cache has slots 0..", capacity - 1);
    cpu::append_paged_kv(params);
}

void update_page_metadata(Tensor k_cache_, Tensor metadata_, Tensor table_, Tensor seq_lens_, Tensor start_lens_,
                          std::string bound_, double bound_scale) {
    const Arg k_cache = cache_arg("k_cache", k_cache_);
    const Arg metadata("page_metadata", metadata_, {4, 5}, kMetadataShape),
        table("block_table", table_, {2}, "[requests, max_blocks]");
    const Arg seq_lens("seq_lens", seq_lens_, {1}, "[requests]"),
        start_lens("start_lens", start_lens_, {1}, "[requests]");
    const DType dtype = dtype_of(k_cache);
    metadata.expect_no_overlap();
    check_metadata_of_cache(metadata, k_cache);
    const int32_t pages_per_block = check_metadata(metadata, k_cache.sizes[3]);
    const int64_t page_size = page_size_of(k_cache, pages_per_block);

    const UpdateParams params{pool_of(k_cache),
                              metadata_of(metadata),
                              paging_of(table, k_cache, page_size, pages_per_block),
                              lengths_of(seq_lens, table.sizes[0], "block_table's number of requests", k_cache),
                              lengths_of(start_lens, table.sizes[0], "block_table's number of requests", k_cache),
                              narrow("requests", table.sizes[0]),
                              narrow("num_kv_heads", k_cache.sizes[2]),
                              narrow("head_dim", k_cache.sizes[3]),
                              dtype,
                              bound_of(bound_, bound_scale)};
    if (params.num_requests == 0 || params.num_kv_heads == 0 || params.paging.max_blocks == 0) return;
    if (k_cache.tensor.is_cuda()) return cuda::update_page_metadata(params, k_cache.tensor.get_device_index());
    check_table_values(params.paging, params.num_requests, params.seq_lens, 1, k_cache.sizes[0]);
    cpu::update_page_metadata(params);
}

Tensor estimate_page_scores(Tensor query_, Tensor metadata_, Tensor table_, Tensor seq_lens_, int64_t page_size,
                            std::string head_reduction, std::string bound) {
    const Arg query("query", query_, {3}, "[rows, num_q_heads, head_dim]"),
        metadata("page_metadata", metadata_, {4, 5}, kMetadataShape);
    const Arg table("block_table", table_, {2}, "[requests, max_blocks]"),
        seq_lens("seq_lens", seq_lens_, {1}, "[rows]");
    EstimateParams params =
        estimate_params(query, metadata, table, seq_lens, page_size, head_reduction, bound_of(bound, 1).kind);
    const int64_t heads = params.head_reduction == HeadReduction::kNone ? params.num_q_heads : params.num_kv_heads;
    Tensor scores = new_empty(query_, {params.num_rows, heads, params.paging.max_pages()}, ScalarType::Float);
    params.scores = static_cast<float*>(scores.data_ptr());
    if (scores.numel() == 0) return scores;
    if (query.tensor.is_cuda()) {
        cuda::estimate_page_scores(params, query.tensor.get_device_index());
    } else {
        check_table_values(params.paging, table.sizes[0], params.seq_lens, params.rows_per_request, metadata.sizes[0]);
        cpu::estimate_page_scores(params);
    }
    return scores;
}

std::tuple<Tensor, Tensor> select_topk_pages(Tensor scores_, Tensor seq_lens_, int64_t page_size, int64_t page_budget,
                                             int64_t sink_pages, int64_t recent_pages,
                                             std::optional<Tensor> page_budgets) {
    const Arg scores("scores", scores_, {3}, "[rows, heads, max_pages]"),
        seq_lens("seq_lens", seq_lens_, {1}, "[rows]");
    scores.expect_dtype(ScalarType::Float);
    scores.expect_contiguous();
    check_page_size(page_size, 1);
    check_budget(page_budget, sink_pages, recent_pages);
    narrow("scores' capacity in tokens", scores.sizes[2] * page_size);
    int32_t budget_heads;
    const int32_t* budgets = budgets_of(page_budgets, scores, scores.sizes[0], scores.sizes[1], &budget_heads);
    const int32_t* lengths = lengths_of(seq_lens, scores.sizes[0], "scores' number of rows", scores);
    Tensor page_ids = new_empty(scores_, {scores.sizes[0], scores.sizes[1], page_budget}, ScalarType::Int);
    Tensor page_counts = new_empty(scores_, {scores.sizes[0], scores.sizes[1]}, ScalarType::Int);
    const SelectParams params{scores.data_as<const float>(),
                              lengths,
                              budgets,
                              budget_heads,
                              static_cast<int32_t*>(page_ids.data_ptr()),
                              static_cast<int32_t*>(page_counts.data_ptr()),
                              narrow("rows", scores.sizes[0]),
                              narrow("heads", scores.sizes[1]),
                              narrow("max_pages", scores.sizes[2]),
                              static_cast<int32_t>(page_size),
                              static_cast<int32_t>(page_budget),
                              static_cast<int32_t>(sink_pages),
                              static_cast<int32_t>(recent_pages)};
    if (page_counts.numel() > 0) {
        if (scores.tensor.is_cuda())
            cuda::select_topk_pages(params, scores.tensor.get_device_index());
        else
            cpu::select_topk_pages(params);
    }
    return {page_ids, page_counts};
}

std::tuple<Tensor, Tensor> new_output(const Tensor& query) {
    if (query.dim() != 3) fail("query must have shape [rows, num_q_heads, head_dim], got ", query.dim(), " dimensions");
    return {new_empty(query, {query.size(0), query.size(1), query.size(2)}, query.scalar_type()),
            new_empty(query, {query.size(0), query.size(1)}, ScalarType::Float)};
}

void sparse_decode_attention_out(Tensor query_, Tensor k_cache_, Tensor v_cache_, Tensor table_, Tensor seq_lens_,
                                 std::optional<Tensor> page_ids_, std::optional<Tensor> page_counts_,
                                 std::optional<int64_t> page_size_, std::optional<double> sm_scale,
                                 std::optional<Tensor> workspace, Tensor out, Tensor lse) {
    const Arg query("query", query_, {3}, "[rows, num_q_heads, head_dim]");
    const Arg k_cache = cache_arg("k_cache", k_cache_), v_cache = cache_arg("v_cache", v_cache_);
    const Arg table("block_table", table_, {2}, "[requests, max_blocks]"),
        seq_lens("seq_lens", seq_lens_, {1}, "[rows]");
    const int64_t page_size = page_size_ ? *page_size_ : k_cache.sizes[1];
    if (page_size < 1 || k_cache.sizes[1] % page_size != 0)
        fail("page_size ", page_size, " does not divide k_cache's blocks of ", k_cache.sizes[1], " tokens");
    check_page_size(page_size, k_cache.sizes[1] / page_size);
    AttentionParams params =
        attention_params(query, k_cache, v_cache, table, seq_lens, page_size, k_cache.sizes[1] / page_size, sm_scale);
    if (page_counts_ && !page_ids_) fail("page_counts was given without page_ids");
    if (page_ids_) {
        const Arg ids("page_ids", *page_ids_, {3}, "[rows, 1 or num_kv_heads or num_q_heads, page_budget]");
        ids.expect_dtype(ScalarType::Int);
        ids.expect_device_of(query);
        ids.expect_size(0, query.sizes[0], "query's number of rows");
        ids.expect_contiguous();
        if (ids.sizes[2] < 1) fail("page_ids must list at least 1 page a row and head, got shape ", ids.shape_text());
        if (ids.sizes[1] != 1 && ids.sizes[1] != params.num_kv_heads && ids.sizes[1] != params.num_q_heads)
            fail("page_ids has ", ids.sizes[1], " heads; supported: 1, num_kv_heads (", params.num_kv_heads,
                 ") or num_q_heads (", params.num_q_heads, ")");
        params.page_ids = ids.data_as<const int32_t>();
        params.id_heads = static_cast<int32_t>(ids.sizes[1]);
        params.max_ids = narrow("page_ids' budget", ids.sizes[2]);
        if (page_counts_) {
            const Arg counts("page_counts", *page_counts_, {2}, "[rows, page_ids' heads]");
            counts.expect_dtype(ScalarType::Int);
            counts.expect_device_of(query);
            for (int64_t i = 0; i < 2; ++i) counts.expect_size(i, ids.sizes[i], "page_ids'");
            counts.expect_contiguous();
            params.page_counts = counts.data_as<const int32_t>();
        }
    }
    bind_output(params, query, out, lse);
    check_workspace(workspace, query);
    if (query.tensor.numel() == 0) return;
    if (query.tensor.is_cuda()) return cuda::sparse_decode_attention(params, {}, query_, workspace);
    check_table_values(params.paging, table.sizes[0], params.seq_lens, params.rows_per_request, k_cache.sizes[0]);
    cpu::sparse_decode_attention(params);
}

std::tuple<Tensor, Tensor> sparse_decode_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor table,
                                                   Tensor seq_lens, std::optional<Tensor> page_ids,
                                                   std::optional<Tensor> page_counts, std::optional<int64_t> page_size,
                                                   std::optional<double> sm_scale, std::optional<Tensor> workspace) {
    auto [out, lse] = new_output(query);
    sparse_decode_attention_out(query, k_cache, v_cache, table, seq_lens, page_ids, page_counts, page_size, sm_scale,
                                workspace, out, lse);
    return {out, lse};
}

void quest_decode_attention_out(Tensor query, Tensor k_cache, Tensor v_cache, Tensor metadata, Tensor table,
                                Tensor seq_lens, int64_t page_budget, int64_t sink_pages, int64_t recent_pages,
                                std::string head_reduction, std::string bound, std::optional<double> sm_scale,
                                std::optional<Tensor> page_budgets, std::optional<Tensor> workspace, Tensor out,
                                Tensor lse) {
    quest_decode({query, k_cache, v_cache, metadata, table, seq_lens, page_budget, sink_pages, recent_pages,
                  head_reduction, bound, sm_scale, page_budgets, workspace},
                 nullptr, out, lse);
}

std::tuple<Tensor, Tensor> quest_decode_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor metadata,
                                                  Tensor table, Tensor seq_lens, int64_t page_budget,
                                                  int64_t sink_pages, int64_t recent_pages, std::string head_reduction,
                                                  std::string bound, std::optional<double> sm_scale,
                                                  std::optional<Tensor> page_budgets, std::optional<Tensor> workspace) {
    auto [out, lse] = new_output(query);
    quest_decode({query, k_cache, v_cache, metadata, table, seq_lens, page_budget, sink_pages, recent_pages,
                  head_reduction, bound, sm_scale, page_budgets, workspace},
                 nullptr, out, lse);
    return {out, lse};
}

void quest_decode_step_out(Tensor query, Tensor key, Tensor value, Tensor k_cache, Tensor v_cache, Tensor metadata,
                           Tensor table, Tensor seq_lens, int64_t page_budget, int64_t sink_pages, int64_t recent_pages,
                           std::string head_reduction, std::string bound, double bound_scale,
                           std::optional<double> sm_scale, std::optional<Tensor> page_budgets,
                           std::optional<Tensor> workspace, Tensor out, Tensor lse) {
    const NewTokens tokens{key, value, bound_scale};
    quest_decode({query, k_cache, v_cache, metadata, table, seq_lens, page_budget, sink_pages, recent_pages,
                  head_reduction, bound, sm_scale, page_budgets, workspace},
                 &tokens, out, lse);
}

std::tuple<Tensor, Tensor> quest_decode_step(Tensor query, Tensor key, Tensor value, Tensor k_cache, Tensor v_cache,
                                             Tensor metadata, Tensor table, Tensor seq_lens, int64_t page_budget,
                                             int64_t sink_pages, int64_t recent_pages, std::string head_reduction,
                                             std::string bound, double bound_scale, std::optional<double> sm_scale,
                                             std::optional<Tensor> page_budgets, std::optional<Tensor> workspace) {
    auto [out, lse] = new_output(query);
    quest_decode_step_out(query, key, value, k_cache, v_cache, metadata, table, seq_lens, page_budget, sink_pages,
                          recent_pages, head_reduction, bound, bound_scale, sm_scale, page_budgets, workspace, out,
                          lse);
    return {out, lse};
}

void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("append_paged_kv", TORCH_BOX(&append_paged_kv));
    library.impl("update_page_metadata", TORCH_BOX(&update_page_metadata));
    library.impl("estimate_page_scores", TORCH_BOX(&estimate_page_scores));
    library.impl("select_topk_pages", TORCH_BOX(&select_topk_pages));
    library.impl("sparse_decode_attention", TORCH_BOX(&sparse_decode_attention));
    library.impl("sparse_decode_attention_out", TORCH_BOX(&sparse_decode_attention_out));
    library.impl("quest_decode_attention", TORCH_BOX(&quest_decode_attention));
    library.impl("quest_decode_attention_out", TORCH_BOX(&quest_decode_attention_out));
    library.impl("quest_decode_step", TORCH_BOX(&quest_decode_step));
    library.impl("quest_decode_step_out", TORCH_BOX(&quest_decode_step_out));
}

}  // namespace
}  // namespace quest

// For `quest-ops info`: the CPU kernels' instruction set, or what is wrong with the one asked for.
extern "C" __attribute__((visibility("default"))) const char* quest_ops_cpu_capability() {
    static thread_local std::string error;
    try {
        return quest::cpu::cpu_capability();
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}

// clang-format off: it would break the schemas inside words
STABLE_TORCH_LIBRARY(quest_ops, library) {
    library.def(
        "append_paged_kv(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) page_metadata, "
        "Tensor slot_mapping, *, str bound=\"minmax\", float bound_scale=1.0) -> ()");
    library.def(
        "update_page_metadata(Tensor k_cache, Tensor(a!) page_metadata, Tensor block_table, Tensor seq_lens, "
        "Tensor start_lens, *, str bound=\"minmax\", float bound_scale=1.0) -> ()");
    library.def(
        "estimate_page_scores(Tensor query, Tensor page_metadata, Tensor block_table, Tensor seq_lens, int page_size, "
        "str head_reduction, *, str bound=\"minmax\") -> Tensor");
    library.def(
        "select_topk_pages(Tensor scores, Tensor seq_lens, int page_size, int page_budget, int sink_pages, "
        "int recent_pages, *, Tensor? page_budgets=None) -> (Tensor, Tensor)");
    library.def(
        "sparse_decode_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
        "Tensor? page_ids=None, Tensor? page_counts=None, *, int? page_size=None, float? sm_scale=None, "
        "Tensor(a!)? workspace=None) -> (Tensor, Tensor)");
    library.def(
        "sparse_decode_attention_out(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_table, "
        "Tensor seq_lens, Tensor? page_ids=None, Tensor? page_counts=None, *, int? page_size=None, "
        "float? sm_scale=None, Tensor(a!)? workspace=None, Tensor(b!) out, Tensor(c!) lse) -> ()");
    library.def(
        "quest_decode_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor page_metadata, "
        "Tensor block_table, Tensor seq_lens, int page_budget, int sink_pages, int recent_pages, str head_reduction, "
        "*, str bound=\"minmax\", float? sm_scale=None, Tensor? page_budgets=None, Tensor(a!)? workspace=None) "
        "-> (Tensor, Tensor)");
    library.def(
        "quest_decode_attention_out(Tensor query, Tensor k_cache, Tensor v_cache, Tensor page_metadata, "
        "Tensor block_table, Tensor seq_lens, int page_budget, int sink_pages, int recent_pages, str head_reduction, "
        "*, str bound=\"minmax\", float? sm_scale=None, Tensor? page_budgets=None, Tensor(a!)? workspace=None, "
        "Tensor(b!) out, Tensor(c!) lse) -> ()");
    library.def(
        "quest_decode_step(Tensor query, Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor(c!) page_metadata, Tensor block_table, Tensor seq_lens, int page_budget, int sink_pages, "
        "int recent_pages, str head_reduction, *, str bound=\"minmax\", float bound_scale=1.0, float? sm_scale=None, "
        "Tensor? page_budgets=None, Tensor(d!)? workspace=None) -> (Tensor, Tensor)");
    library.def(
        "quest_decode_step_out(Tensor query, Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor(c!) page_metadata, Tensor block_table, Tensor seq_lens, int page_budget, int sink_pages, "
        "int recent_pages, str head_reduction, *, str bound=\"minmax\", float bound_scale=1.0, float? sm_scale=None, "
        "Tensor? page_budgets=None, Tensor(d!)? workspace=None, Tensor(e!) out, Tensor(f!) lse) -> ()");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(quest_ops, CPU, library) { quest::implement(library); }
STABLE_TORCH_LIBRARY_IMPL(quest_ops, CUDA, library) { quest::implement(library); }
