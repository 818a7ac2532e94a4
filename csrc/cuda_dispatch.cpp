#include "cuda_dispatch.h"

#include "checks.h"

#ifdef QUEST_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <mutex>
#include <vector>

#include "cuda/launch.h"
#endif

namespace quest::cuda {

#ifdef QUEST_WITH_CUDA

namespace {

void check(cudaError_t error, const char* op, int32_t device, Chip chip) {
    if (error == cudaSuccess) return;
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
        fail(op, ": no kernel image for cuda:", device, " of compute capability ", chip.capability / 10, ".",
             chip.capability % 10, "; this build has ", QUEST_CUDA_ARCHS,
             ". Rebuild with QUEST_OPS_CUDA_ARCHS=", chip.capability);
    fail(op, " failed on cuda:", device, ": ", cudaGetErrorString(error));
}

Chip chip_of(int32_t device) {
    static std::mutex mutex;
    static std::vector<Chip> chips;
    const std::lock_guard<std::mutex> lock(mutex);
    if (device >= static_cast<int32_t>(chips.size())) chips.resize(device + 1, Chip{0, 0});
    Chip& chip = chips[device];
    if (chip.num_sms == 0) {
        int major = 0, minor = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device query", device, chip);
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device query", device, chip);
        check(cudaDeviceGetAttribute(&chip.num_sms, cudaDevAttrMultiProcessorCount, device), "device query", device,
              chip);
        chip.capability = 10 * major + minor;
    }
    return chip;
}

// torch's current stream. Looked up at run time, so that the library also loads under a CPU build of torch, which lacks
// it.
cudaStream_t current_stream(int32_t device) {
    using Getter = AOTITorchError (*)(int32_t, void**);
    static const Getter getter = [] {
        void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return torch_cuda ? reinterpret_cast<Getter>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    void* stream = nullptr;
    if (!getter || getter(device, &stream) != AOTI_TORCH_SUCCESS)
        fail("torch gave no current stream for cuda:", device);
    return static_cast<cudaStream_t>(stream);
}

// Makes `device` current for the scope and finds its current stream.
struct Scope {
    torch::stable::accelerator::DeviceGuard guard;
    Chip chip;
    cudaStream_t stream;

    explicit Scope(int32_t device) : guard(device), chip(chip_of(device)), stream(current_stream(device)) {}
};

template <class Params>
void run(cudaError_t (*launch)(const Params&, Chip, cudaStream_t), const Params& params, const char* op,
         int32_t device) {
    const Scope scope(device);
    check(launch(params, scope.chip, scope.stream), op, device, scope.chip);
}

void append_in(const Scope& scope, const AppendParams& append, int32_t device) {
    if (append.num_tokens > 0)
        check(launch_append_paged_kv(append, scope.chip, scope.stream), "append_paged_kv", device, scope.chip);
}

// A launch of teams: 2^size_log2 blocks each, and the words of workspace that all need. size_log2 < 0: there is none.
struct Teams {
    int32_t size_log2;
    int64_t words;

    // max_pages: 0 where nothing is selected.
    Teams(const AttentionParams& a, int32_t max_pages, DType metadata, Chip chip) {
        const int64_t count = int64_t(a.num_rows) * a.num_kv_heads;
        const int32_t group = a.num_q_heads / a.num_kv_heads;
        size_log2 = plan_team(chip, count, group, a.head_dim, max_pages, bits_of(metadata));
        words = size_log2 < 0 ? 0 : workspace_words(count, 1 << size_log2, group, a.head_dim, max_pages);
    }
};

// What a launch of teams cannot append by itself is appended before: a row of several sees its request's other new
// tokens, which only the cache has.
void leave_what_teams_append(const Scope& scope, FusedParams& params, int32_t device) {
    if (params.attention.rows_per_request == 1) return;
    append_in(scope, params.append, device);
    params.append.num_tokens = 0;
}

}  // namespace

void append_paged_kv(const AppendParams& params, int32_t device) {
    run(launch_append_paged_kv, params, "append_paged_kv", device);
}
void update_page_metadata(const UpdateParams& params, int32_t device) {
    run(launch_update_page_metadata, params, "update_page_metadata", device);
}
void estimate_page_scores(const EstimateParams& params, int32_t device) {
    run(launch_estimate_page_scores, params, "estimate_page_scores", device);
}
void select_topk_pages(const SelectParams& params, int32_t device) {
    run(launch_select_topk_pages, params, "select_topk_pages", device);
}

void check_workspace_size(const torch::stable::Tensor& workspace, int64_t words) {
    if (workspace.numel() < 4 * words)
        fail("workspace has ", workspace.numel(), " bytes; this call needs ", 4 * words, " (32 MiB suffices for any)");
}

void sparse_decode_attention(const AttentionParams& params, const AppendParams& append,
                             const torch::stable::Tensor& like, const std::optional<torch::stable::Tensor>& workspace) {
    const int32_t device = like.get_device_index();
    const Scope scope(device);
    if (workspace && !params.page_ids) {
        const Teams teams(params, 0, params.dtype, scope.chip);
        if (teams.size_log2 >= 0) {
            check_workspace_size(*workspace, teams.words);
            FusedParams dense{};
            dense.attention = params;
            dense.append = append;
            leave_what_teams_append(scope, dense, device);
            return check(
                launch_dense_decode_attention(dense, teams.size_log2, static_cast<uint32_t*>(workspace->data_ptr()),
                                              scope.chip, scope.stream),
                "sparse_decode_attention", device, scope.chip);
        }
    }
    append_in(scope, append, device);
    AttentionScratch scratch{attention_splits(params, scope.chip), nullptr, nullptr};
    torch::stable::Tensor partial;  // [num_splits, R, Hq, D + 1]: the outputs, then the lse
    if (scratch.num_splits > 1) {
        const int64_t items = int64_t(scratch.num_splits) * params.num_rows * params.num_q_heads;
        partial = torch::stable::new_empty(like, {items * (params.head_dim + 1)}, torch::headeronly::ScalarType::Float);
        scratch.out = static_cast<float*>(partial.data_ptr());
        scratch.lse = scratch.out + items * params.head_dim;
    }
    check(launch_sparse_decode_attention(params, scratch, scope.chip, scope.stream), "sparse_decode_attention", device,
          scope.chip);
}

bool fused_quest_decode_attention(FusedParams params, const torch::stable::Tensor& like,
                                  const std::optional<torch::stable::Tensor>& workspace) {
    const AttentionParams& a = params.attention;
    const int32_t device = like.get_device_index();
    const Scope scope(device);
    const Teams teams(a, a.paging.max_pages(), params.metadata.dtype, scope.chip);
    if (teams.size_log2 < 0 || a.num_blocks == 0) return false;
    torch::stable::Tensor scratch;
    if (workspace) {
        check_workspace_size(*workspace, teams.words);
        scratch = *workspace;
    } else {
        scratch = torch::stable::new_empty(like, {teams.words}, torch::headeronly::ScalarType::Int);
        check(launch_clear(static_cast<uint32_t*>(scratch.data_ptr()), teams.words, scope.chip, scope.stream),
              "quest_decode_attention", device, scope.chip);
    }
    leave_what_teams_append(scope, params, device);
    check(launch_quest_decode_attention(params, teams.size_log2, static_cast<uint32_t*>(scratch.data_ptr()), scope.chip,
                                        scope.stream),
          "quest_decode_attention", device, scope.chip);
    return true;
}

#else

namespace {
[[noreturn]] void without_cuda() {
    fail(
        "this build has CPU kernels only. Rebuild where nvcc is found: QUEST_OPS_DEVICE=cuda pip install "
        "--no-cache-dir --force-reinstall quest_ops");
}
}  // namespace

void append_paged_kv(const AppendParams&, int32_t) { without_cuda(); }
void update_page_metadata(const UpdateParams&, int32_t) { without_cuda(); }
void estimate_page_scores(const EstimateParams&, int32_t) { without_cuda(); }
void select_topk_pages(const SelectParams&, int32_t) { without_cuda(); }
void sparse_decode_attention(const AttentionParams&, const AppendParams&, const torch::stable::Tensor&,
                             const std::optional<torch::stable::Tensor>&) {
    without_cuda();
}
bool fused_quest_decode_attention(FusedParams, const torch::stable::Tensor&,
                                  const std::optional<torch::stable::Tensor>&) {
    without_cuda();
}

#endif

}  // namespace quest::cuda
