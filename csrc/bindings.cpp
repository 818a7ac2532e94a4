// The pybind11 module quest_ops._C: what was built, and the launch planner. No torch, no CUDA: importable anywhere,
// needed nowhere.
#include <pybind11/pybind11.h>

#include "plan.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
    module.doc() = "Build information and the launch planner of quest_ops.";
    module.attr("version") = QUEST_VERSION;
    module.attr("cuda_archs") = QUEST_CUDA_ARCHS;      // as given to CMake, "" in a CPU-only build
    module.attr("cuda_version") = QUEST_CUDA_VERSION;  // of nvcc
    module.attr("compiler") = __VERSION__;
    module.def(
        "plan_attention_splits",
        [](int capability, int num_sms, int64_t items, int64_t tiles, int head_dim, bool ragged) {
            return quest::plan_attention_splits({capability, num_sms}, items, tiles, head_dim, ragged);
        },
        py::arg("capability"), py::arg("num_sms"), py::arg("items"), py::arg("tiles"), py::arg("head_dim"),
        py::arg("ragged"),
        "Thread blocks that share one (row, group of query heads) in sparse_decode_attention; `tiles` of 16 tokens at "
        "most; `ragged`: rows may differ much in length.");
    module.def(
        "plan_walking_blocks",
        [](int capability, int num_sms, int64_t items, int max_pages, int pages_per_block) {
            return quest::plan_walking_blocks({capability, num_sms}, items, max_pages, pages_per_block);
        },
        py::arg("capability"), py::arg("num_sms"), py::arg("items"), py::arg("max_pages"), py::arg("pages_per_block"),
        "Thread blocks that walk the pages of one (row, KV head) in estimate_page_scores and update_page_metadata.");
    module.def(
        "plan_team",
        [](int capability, int num_sms, int64_t teams, int group, int head_dim, int max_pages, int metadata_bits) {
            const int n = quest::plan_team({capability, num_sms}, teams, group, head_dim, max_pages, metadata_bits);
            return n < 0 ? 0 : 1 << n;
        },
        py::arg("capability"), py::arg("num_sms"), py::arg("teams"), py::arg("group"), py::arg("head_dim"),
        py::arg("max_pages"), py::arg("metadata_bits") = 16,
        "Thread blocks that serve one (row, KV head) in the one-launch quest_decode_attention, or, with max_pages "
        "0, in dense sparse_decode_attention with a workspace; 0: the portable path is taken.");
    module.def(
        "plan_spare_blocks",
        [](int capability, int num_sms, int64_t blocks, int head_dim, int64_t items) {
            return quest::plan_spare_blocks({capability, num_sms}, blocks, head_dim, items);
        },
        py::arg("capability"), py::arg("num_sms"), py::arg("blocks"), py::arg("head_dim"), py::arg("items"),
        "Thread blocks of quest_decode_step's one launch beside the `blocks` of its teams: they append `items` (token, "
        "KV head) pairs.");
    module.def(
        "starts_as_gang",
        [](int capability, int num_sms, int64_t blocks, int head_dim) {
            return quest::starts_as_gang({capability, num_sms}, blocks, head_dim);
        },
        py::arg("capability"), py::arg("num_sms"), py::arg("blocks"), py::arg("head_dim"),
        "Whether a launch of teams, `blocks` in all, starts all blocks at once; else they start as room is made.");
    module.def(
        "overlaps_launches", [](int capability) { return quest::overlaps_launches({capability, 1}); },
        py::arg("capability"), "Whether kernels are chained by programmatic dependent launch.");
}
