// Writes K and V rows to their slots and computes the metadata of each touched page afresh.
// Work item: the tokens of one page (adjacent in slot_mapping) and one KV head. Bound by memory traffic.
#include "page_bounds.h"

namespace quest::cpu::QUEST_CPU_ISA {
namespace {

struct PageRun {
    int64_t page;        // block * M + part
    int32_t begin, end;  // tokens of the call; skipped ones may lie between
    int32_t highest;     // offset within the page
};

int64_t find_page_runs(const AppendParams& p, PageRun* runs) {
    int64_t count = 0;
    for (int32_t i = 0; i < p.num_tokens; ++i) {
        const int64_t slot = p.slot_mapping[i];
        if (slot < 0) continue;
        const int64_t page = slot / p.page_size;
        const int32_t offset = int32_t(slot - page * p.page_size);
        if (count > 0 && runs[count - 1].page == page) {
            runs[count - 1].end = i + 1;
            runs[count - 1].highest = std::max(runs[count - 1].highest, offset);
        } else {
            runs[count++] = {page, i, i + 1, offset};
        }
    }
    return count;
}

template <typename T>
T* token_row(const Pool& pool, int64_t slot, int64_t block_size, int head) {
    const int64_t block = slot / block_size;
    return at<T>(pool.data,
                 block * pool.block_stride + (slot - block * block_size) * pool.token_stride + head * pool.head_stride);
}

template <typename T, typename Bound>
void append_run(const AppendParams& p, const PageRun& run, int head) {
    const int64_t block_size = int64_t(p.page_size) * p.pages_per_block;
    const size_t row_bytes = sizeof(T) * p.head_dim;
    for (int64_t i = run.begin; i < run.end; ++i) {
        const int64_t slot = p.slot_mapping[i];
        if (slot < 0) continue;
        std::memcpy(token_row<T>(p.k_cache, slot, block_size, head),
                    at<T>(p.key.data, i * p.key.row_stride + head * p.key.head_stride), row_bytes);
        std::memcpy(token_row<T>(p.v_cache, slot, block_size, head),
                    at<T>(p.value.data, i * p.value.row_stride + head * p.value.head_stride), row_bytes);
    }
    const int64_t block = run.page / p.pages_per_block, part = run.page % p.pages_per_block;
    store_page_bounds(token_row<T>(p.k_cache, run.page * p.page_size, block_size, head), p.k_cache.token_stride,
                      run.highest + 1, p.head_dim, p.bound,
                      page_bounds<Bound>(p.metadata, block, head, part, p.head_dim));
}

}  // namespace

void append_paged_kv(const AppendParams& p) {
    Scratch<PageRun> runs(p.num_tokens);
    const int64_t num_runs = find_page_runs(p, runs.data());
    with_dtypes(p.dtype, p.metadata.dtype, [&](auto element, auto bound) {
        using T = decltype(element);
        using Bound = decltype(bound);
        const int64_t grain = grain_for(int64_t(sizeof(T)) * p.head_dim * p.page_size * 3);
        parallel_for(num_runs * p.num_kv_heads, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                append_run<T, Bound>(p, runs[i / p.num_kv_heads], int(i % p.num_kv_heads));
            }
        });
    });
}

}  // namespace quest::cpu::QUEST_CPU_ISA
