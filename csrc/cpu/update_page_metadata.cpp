// Computes the metadata of every page that holds a token of [start, seq_len) from the stored keys.
// Work item: one page and one KV head. Bound by reading the keys.
#include "page_bounds.h"

namespace quest::cpu::QUEST_CPU_ISA {
namespace {

struct StalePage {
    int32_t request, page, tokens;
};

template <typename T, typename Bound>
void update_page(const UpdateParams& p, const StalePage& stale, int head) {
    const Paging& paging = p.paging;
    const int64_t part = stale.page % paging.pages_per_block;
    const int64_t block = paging.block_table[stale.request * paging.table_stride + stale.page / paging.pages_per_block];
    const T* keys = at<T>(p.k_cache.data, block * p.k_cache.block_stride + head * p.k_cache.head_stride +
                                              part * paging.page_size * p.k_cache.token_stride);
    store_page_bounds(keys, p.k_cache.token_stride, stale.tokens, p.head_dim, p.bound,
                      page_bounds<Bound>(p.metadata, block, head, part, p.head_dim));
}

}  // namespace

void update_page_metadata(const UpdateParams& p) {
    const int64_t page_size = p.paging.page_size;
    const auto length_of = [&](int64_t b) { return clamp_length(p.seq_lens[b], p.paging.max_pages(), page_size); };
    const auto first_page_of = [&](int64_t b) { return std::max<int64_t>(p.start_lens[b], 0) / page_size; };
    const auto is_stale = [&](int64_t b) { return p.start_lens[b] < length_of(b); };

    int64_t num_stale = 0;
    for (int64_t b = 0; b < p.num_requests; ++b) {
        if (is_stale(b)) num_stale += ceil_div(length_of(b), page_size) - first_page_of(b);
    }
    Scratch<StalePage> stale(num_stale);
    int64_t n = 0;
    for (int64_t b = 0; b < p.num_requests; ++b) {
        if (!is_stale(b)) continue;
        const int64_t length = length_of(b);
        for (int64_t page = first_page_of(b); page * page_size < length; ++page) {
            stale[n++] = {int32_t(b), int32_t(page), int32_t(std::min(page_size, length - page * page_size))};
        }
    }

    with_dtypes(p.dtype, p.metadata.dtype, [&](auto element, auto bound) {
        using T = decltype(element);
        using Bound = decltype(bound);
        const int64_t grain = grain_for(int64_t(sizeof(T)) * p.head_dim * page_size);
        parallel_for(num_stale * p.num_kv_heads, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                update_page<T, Bound>(p, stale[i / p.num_kv_heads], int(i % p.num_kv_heads));
            }
        });
    });
}

}  // namespace quest::cpu::QUEST_CPU_ISA
