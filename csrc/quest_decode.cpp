// The checks of a whole decode step, and its way through one launch, a chain of launches, or CPU kernels.
#include "quest_decode.h"

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cuda_dispatch.h"

namespace quest {

namespace {

// On the CPU: where each row's last token goes, then as any append.
void append_last_tokens(AppendParams params) {
    const Paging& paging = params.paging;
    std::vector<int64_t> slots(params.num_tokens, -1);
    for (int32_t i = 0; i < params.num_tokens; ++i) {
        const int64_t at = std::min<int64_t>(params.seq_lens[i], int64_t(paging.max_blocks) * paging.block_size()) - 1;
        if (at < 0) continue;
        const int64_t entry = i / params.rows_per_request * paging.table_stride + at / paging.block_size();
        slots[i] = int64_t(paging.block_table[entry]) * paging.block_size() + at % paging.block_size();
    }
    params.slot_mapping = slots.data();
    cpu::append_paged_kv(params);
}

}  // namespace

void quest_decode(const QuestInputs& in, const NewTokens* tokens, const Tensor& out, const Tensor& lse) {
    const Arg query("query", in.query, {3}, "[rows, num_q_heads, head_dim]");
    const Arg k_cache = cache_arg("k_cache", in.k_cache), v_cache = cache_arg("v_cache", in.v_cache);
    const Arg metadata("page_metadata", in.metadata, {4, 5}, kMetadataShape);
    const Arg table("block_table", in.table, {2}, "[requests, max_blocks]"),
        seq_lens("seq_lens", in.seq_lens, {1}, "[rows]");
    check_metadata_of_cache(metadata, k_cache);
    const int64_t page_size = page_size_of(k_cache, check_metadata(metadata, k_cache.sizes[3]));
    AttentionParams attention = attention_params(query, k_cache, v_cache, table, seq_lens, page_size,
                                                 k_cache.sizes[1] / page_size, in.sm_scale);
    const BoundRule bound = bound_of(in.bound, tokens ? tokens->bound_scale : 1);
    EstimateParams estimate =
        estimate_params(query, metadata, table, seq_lens, page_size, in.head_reduction, bound.kind);
    check_budget(in.page_budget, in.sink_pages, in.recent_pages);
    const int64_t heads =
        estimate.head_reduction == HeadReduction::kNone ? estimate.num_q_heads : estimate.num_kv_heads;
    int32_t budget_heads;
    const int32_t* budgets = budgets_of(in.page_budgets, query, query.sizes[0], heads, &budget_heads);
    bind_output(attention, query, out, lse);
    check_workspace(in.workspace, query);
    AppendParams append{};
    if (tokens) {
        append = append_params(tokens->key, tokens->value, k_cache, v_cache, metadata, bound);
        if (append.num_tokens != attention.num_rows)
            fail("key has ", append.num_tokens, " rows, but query has ", attention.num_rows);
        append.seq_lens = attention.seq_lens;
        append.paging = attention.paging;
        append.rows_per_request = attention.rows_per_request;
        if (append.paging.max_blocks == 0) append.num_tokens = 0;
    }
    if (query.tensor.numel() == 0) return;
    const bool on_gpu = query.tensor.is_cuda();
    const int32_t device = query.tensor.get_device_index();
    if (!on_gpu)
        check_table_values(attention.paging, table.sizes[0], attention.seq_lens, attention.rows_per_request,
                           k_cache.sizes[0]);

    // A budget that covers the whole table leaves nothing to select.
    const int32_t max_pages = estimate.paging.max_pages();
    const bool covers = in.page_budget >= max_pages && !budgets;
    const int64_t kept = std::min<int64_t>(in.page_budget, std::max(max_pages, 1));
    if (on_gpu && estimate.head_reduction != HeadReduction::kNone && !covers) {
        const FusedParams fused{attention,
                                estimate.metadata,
                                estimate.head_reduction,
                                budgets,
                                budget_heads,
                                static_cast<int32_t>(kept),
                                static_cast<int32_t>(in.sink_pages),
                                static_cast<int32_t>(in.recent_pages),
                                append};
        if (cuda::fused_quest_decode_attention(fused, in.query, in.workspace)) return;
    }
    if (on_gpu && covers) return cuda::sparse_decode_attention(attention, append, in.query, in.workspace);
    if (append.num_tokens > 0) on_gpu ? cuda::append_paged_kv(append, device) : append_last_tokens(append);
    Tensor scores, page_ids, page_counts;
    SelectParams select{};
    if (!covers) {
        scores = new_empty(in.query, {estimate.num_rows, heads, max_pages}, ScalarType::Float);
        page_ids = new_empty(in.query, {estimate.num_rows, heads, kept}, ScalarType::Int);
        page_counts = new_empty(in.query, {estimate.num_rows, heads}, ScalarType::Int);
        estimate.scores = static_cast<float*>(scores.data_ptr());
        estimate.fill_tail = false;
        estimate.skip_pages = budgets ? 0 : static_cast<int32_t>(kept);
        attention.page_ids = static_cast<const int32_t*>(page_ids.data_ptr());
        attention.page_counts = static_cast<const int32_t*>(page_counts.data_ptr());
        attention.id_heads = static_cast<int32_t>(heads);
        attention.max_ids = static_cast<int32_t>(kept);
        select = {estimate.scores,
                  estimate.seq_lens,
                  budgets,
                  budget_heads,
                  static_cast<int32_t*>(page_ids.data_ptr()),
                  static_cast<int32_t*>(page_counts.data_ptr()),
                  estimate.num_rows,
                  static_cast<int32_t>(heads),
                  max_pages,
                  static_cast<int32_t>(page_size),
                  static_cast<int32_t>(kept),
                  static_cast<int32_t>(in.sink_pages),
                  static_cast<int32_t>(in.recent_pages)};
        if (on_gpu) {
            cuda::estimate_page_scores(estimate, device);
            cuda::select_topk_pages(select, device);
        } else {
            cpu::estimate_page_scores(estimate);
            cpu::select_topk_pages(select);
        }
    }
    if (on_gpu)
        cuda::sparse_decode_attention(attention, {}, in.query, in.workspace);
    else
        cpu::sparse_decode_attention(attention);
}

}  // namespace quest
