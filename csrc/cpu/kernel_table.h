// The kernels of one instruction set. Every kernel file is compiled once for each, as namespace QUEST_CPU_ISA.
#pragma once
#include "kernels.h"

namespace quest::cpu {

struct KernelTable {
    void (*append_paged_kv)(const AppendParams&);
    void (*update_page_metadata)(const UpdateParams&);
    void (*estimate_page_scores)(const EstimateParams&);
    void (*select_topk_pages)(const SelectParams&);
    void (*sparse_decode_attention)(const AttentionParams&);
};

}  // namespace quest::cpu
