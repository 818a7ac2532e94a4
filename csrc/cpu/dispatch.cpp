// Picks the instruction set once, at the first call, and sends every op to the kernels compiled for it.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernel_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace quest::cpu {

namespace plain {
extern const KernelTable kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kernels;
}
namespace avx512 {
extern const KernelTable kernels;
}
#endif

namespace {

struct Capability {
    const char* name;
    const KernelTable* kernels;
    bool supported;
};

Capability choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned eax, ebx, ecx = 0, edx;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    const bool has_avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const Capability known[] = {
        {"avx512", &avx512::kernels, has_avx512}, {"avx2", &avx2::kernels, has_avx2}, {"plain", &plain::kernels, true}};
#else
    const Capability known[] = {{"plain", &plain::kernels, true}};
#endif
    const char* variable = std::getenv("QUEST_OPS_CPU_CAPABILITY");
    const std::string wanted = variable == nullptr ? "" : variable;
    std::string supported;
    for (const Capability& c : known) {
        if (!c.supported) continue;
        if (wanted.empty() || wanted == c.name) return c;
        supported += (supported.empty() ? "" : ", ") + std::string(c.name);
    }
    throw std::runtime_error("QUEST_OPS_CPU_CAPABILITY is \"" + wanted + "\"; this machine and build support " +
                             supported);
}

const Capability& chosen() {
    static const Capability capability = choose();
    return capability;
}

}  // namespace

const char* cpu_capability() { return chosen().name; }

void append_paged_kv(const AppendParams& p) { chosen().kernels->append_paged_kv(p); }
void update_page_metadata(const UpdateParams& p) { chosen().kernels->update_page_metadata(p); }
void estimate_page_scores(const EstimateParams& p) { chosen().kernels->estimate_page_scores(p); }
void select_topk_pages(const SelectParams& p) { chosen().kernels->select_topk_pages(p); }
void sparse_decode_attention(const AttentionParams& p) { chosen().kernels->sparse_decode_attention(p); }

}  // namespace quest::cpu
