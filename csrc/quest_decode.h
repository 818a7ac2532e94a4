// What the ops of a whole decode step share: quest_decode_attention, and quest_decode_step, which appends first.
#pragma once
#include <optional>
#include <string>

#include "checks.h"

namespace quest {

// What both ops of a whole decode step take.
struct QuestInputs {
    Tensor query, k_cache, v_cache, metadata, table, seq_lens;
    int64_t page_budget, sink_pages, recent_pages;
    std::string head_reduction, bound;
    std::optional<double> sm_scale;
    std::optional<Tensor> page_budgets, workspace;
};

// The rows' new keys and values, which a step appends first.
struct NewTokens {
    Tensor key, value;
    double bound_scale;
};

// tokens: null where nothing is to be appended.
void quest_decode(const QuestInputs& in, const NewTokens* tokens, const Tensor& out, const Tensor& lse);

}  // namespace quest
