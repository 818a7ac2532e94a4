#include "kernel_table.h"

#include "isa.h"

namespace quest::cpu::QUEST_CPU_ISA {

extern const KernelTable kernels;
const KernelTable kernels = {append_paged_kv, update_page_metadata, estimate_page_scores, select_topk_pages,
                             sparse_decode_attention};

}  // namespace quest::cpu::QUEST_CPU_ISA
