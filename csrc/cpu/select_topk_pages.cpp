// The sink pages, the recent pages and the best of the others by score, exactly as many as the budget holds.
// Work item: one row and head. The threshold is found by bisection on the scores' bits: at most 32 vectorised counts.
#include "isa.h"

namespace quest::cpu::QUEST_CPU_ISA {
namespace {

// Signed integers in the order of the scores: NaN above +inf, -0 equal to +0.
void order_keys(const float* scores, int64_t count, int32_t* keys) {
    for (int64_t i = 0; i < count; ++i) {
        const float score = scores[i] + 0.0f;
        int32_t bits;
        std::memcpy(&bits, &score, sizeof(bits));
        const int32_t key = bits ^ (bits >> 31 & 0x7fffffff);
        keys[i] = score == score ? key : 0x7fffffff;
    }
}

int64_t count_at_least(const int32_t* keys, int64_t count, int32_t threshold) {
    int32_t found = 0;
    for (int64_t i = 0; i < count; ++i) found += keys[i] >= threshold;
    return found;
}

struct Threshold {
    int32_t key;     // above it: chosen
    int64_t of_key;  // and so many of the first pages equal to it
};

// wanted: at least 1, less than count.
Threshold find_threshold(const int32_t* keys, int64_t count, int64_t wanted) {
    int32_t lowest = keys[0], highest = keys[0];
    for (int64_t i = 1; i < count; ++i) {
        lowest = std::min(lowest, keys[i]);
        highest = std::max(highest, keys[i]);
    }
    // At least wanted keys are >= low; fewer are > high.
    int64_t low = lowest, high = highest;
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        const int64_t found = count_at_least(keys, count, int32_t(middle));
        if (found == wanted) return {int32_t(middle - 1), 0};
        if (found > wanted) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const int64_t above = low == highest ? 0 : count_at_least(keys, count, int32_t(low + 1));
    return {int32_t(low), wanted - above};
}

struct PageWriter {
    int32_t* ids;
    int64_t count = 0;
    void write(int64_t page) { ids[count++] = int32_t(page); }
    void write_range(int64_t begin, int64_t end) {
        for (int64_t page = begin; page < end; ++page) write(page);
    }
};

// Appends the wanted best pages of [begin, end).
void write_best(const float* scores, int64_t begin, int64_t end, int64_t wanted, int32_t* keys, PageWriter& pages) {
    if (wanted <= 0) return;
    order_keys(scores + begin, end - begin, keys);
    Threshold threshold = find_threshold(keys, end - begin, wanted);
    for (int64_t i = 0; i < end - begin; ++i) {
        if (keys[i] < threshold.key) continue;
        if (keys[i] == threshold.key && threshold.of_key-- <= 0) continue;
        pages.write(begin + i);
    }
}

void select_list(const SelectParams& p, int64_t row, int64_t head, int32_t* keys) {
    const int64_t length = clamp_length(p.seq_lens[row], p.max_pages, p.page_size);
    const int64_t num_pages = ceil_div(length, p.page_size);
    const int64_t recent = std::max(p.recent_pages, 1);
    int64_t budget = p.page_budget;
    if (p.page_budgets != nullptr) {
        const int64_t asked = p.page_budgets[row * p.budget_heads + (p.budget_heads == 1 ? 0 : head)];
        budget = std::min(std::max(asked, p.sink_pages + recent), budget);
    }
    const int64_t list = row * p.num_heads + head;
    PageWriter pages{p.page_ids + list * p.page_budget};
    if (num_pages <= budget) {
        pages.write_range(0, num_pages);
    } else {
        const int64_t end = num_pages - recent;
        pages.write_range(0, p.sink_pages);
        write_best(p.scores + list * p.max_pages, p.sink_pages, end, budget - p.sink_pages - recent, keys, pages);
        pages.write_range(end, num_pages);
    }
    p.page_counts[list] = int32_t(pages.count);
    std::fill(pages.ids + pages.count, pages.ids + p.page_budget, -1);
}

}  // namespace

void select_topk_pages(const SelectParams& p) {
    int64_t longest = 0;
    for (int64_t r = 0; r < p.num_rows; ++r) longest = std::max<int64_t>(longest, p.seq_lens[r]);
    const int64_t most_pages = ceil_div(clamp_length(longest, p.max_pages, p.page_size), p.page_size);
    // The keys of a list are read some 20 times.
    const int64_t grain = grain_for(int64_t(sizeof(float)) * most_pages * 20);
    parallel_for(int64_t(p.num_rows) * p.num_heads, grain, [&](int64_t begin, int64_t end) {
        Scratch<int32_t> keys(most_pages);
        for (int64_t i = begin; i < end; ++i) select_list(p, i / p.num_heads, i % p.num_heads, keys.data());
    });
}

}  // namespace quest::cpu::QUEST_CPU_ISA
