// How fast a decode step's access pattern can be, whatever is computed: a kernel that reads what quest_decode_attention
// reads, by the same teams of blocks and with the same dependences, and exchanges as many words, but computes nothing.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -o /tmp/chain_floor benchmarks/chain_floor.cu
//     /tmp/chain_floor > benchmarks/results/chain-floor-h100.json
//
// A row is the fastest of four moments at which the next launch may start; pools as in kernels.py: several layers' own,
// pages of 16 and 128 channels in 16 bits, scattered, launches in a CUDA graph that overlap. "until":
// - reads: the metadata of all pages, a warp's first tile before the launch before has ended; K and V of the 128 pages
//   that a budget of 2,048 tokens keeps, which wait for nothing; in dense rows those of all pages, the first ones
//   early.
// - keys: K and V wait for a word of every page, but 2,048 at most, from all blocks of the team.
// - parts: and then the output for the parts of all blocks, which they exchange as the op does.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "chain_floor.cuh"

#define CHECK(call)                                                        \
    do {                                                                   \
        const cudaError_t error = call;                                    \
        if (error != cudaSuccess) {                                        \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
            exit(1);                                                       \
        }                                                                  \
    } while (0)

__global__ void fill(uint32_t* to, size_t words) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < words; i += size_t(gridDim.x) * blockDim.x)
        to[i] = uint32_t(i) * 2654435761u ^ uint32_t(i >> 9);
}

template <class T>
T* allocate(size_t bytes, bool random = true) {
    void* memory;
    CHECK(cudaMalloc(&memory, bytes));
    CHECK(cudaMemset(memory, 0, bytes));
    if (random) fill<<<2048, 256>>>(static_cast<uint32_t*>(memory), bytes / 4);
    return static_cast<T*>(memory);
}

struct Case {
    const char* name;
    int rows, heads, pages;
    std::vector<int> sizes_log2;
    bool dense = false;
};

float microseconds(Params p, const std::vector<char*>& metadata, const std::vector<char*>& caches,
                   uint32_t* const words[2], int bits, int sms) {
    p.workspace = words[1];
    const int teams = p.rows * p.heads, blocks = teams << p.size_log2;
    const bool gang = blocks <= sms;
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (size_t i = 0; i < caches.size(); ++i) {
        p.metadata = metadata[i], p.cache = caches[i];
        p.last_workspace = p.workspace, p.workspace = words[i % 2];
        cudaLaunchAttribute attributes[2];
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = 1;
        attributes[1].id = cudaLaunchAttributeCooperative;
        attributes[1].val.cooperative = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(std::max(blocks, sms)), config.blockDim = dim3(kThreads), config.stream = stream;
        config.attrs = attributes, config.numAttrs = gang ? 2 : 1;
        CHECK(cudaLaunchKernelEx(&config, bits == 16 ? chain<16> : bits == 8 ? chain<8> : chain<0>, p));
    }
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    std::vector<float> times;
    for (int i = 0; i < 23; ++i) {
        CHECK(cudaEventRecord(from, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(to, stream));
        CHECK(cudaEventSynchronize(to));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, from, to));
        if (i >= 3) times.push_back(ms * 1e3f / caches.size());
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(stream));
    std::sort(times.begin(), times.end());
    return (times[9] + times[10]) / 2;
}

int main() {
    cudaDeviceProp gpu;
    CHECK(cudaGetDeviceProperties(&gpu, 0));
    const int sms = gpu.multiProcessorCount, query_heads = 32, kept = 128;
    const Case cases[] = {{"mha-32k-b1", 1, 32, 2048, {2, 3}},           {"mha-128k-b1", 1, 32, 8192, {2, 3}},
                          {"gqa8-32k-b1", 1, 8, 2048, {3, 4, 5}},        {"gqa8-128k-b1", 1, 8, 8192, {3, 4, 5}},
                          {"gqa8-32k-b8", 8, 8, 2048, {1, 2}},           {"dense-gqa8-2k-b1", 1, 8, 128, {3, 4}, true},
                          {"dense-gqa8-4k-b1", 1, 8, 256, {4, 5}, true}, {"dense-gqa8-8k-b1", 1, 8, 512, {4, 5}, true}};
    const char *stages[] = {"reads", "keys", "parts"},
               *starts[] = {"at once", "bounds asked for", "keys published", "pages asked for"};
    printf("{\n \"gpu\": \"%s\",\n \"command\": \"chain_floor\",\n \"what\": \"microseconds a launch\",\n \"rows\": [",
           gpu.name);
    const char* between = "\n";
    for (const Case& c : cases) {
        const size_t pages = size_t(c.rows) * c.pages, cache_bytes = pages * c.heads * 2 * kPageBytes,
                     least = size_t(c.rows) * c.heads *
                             (c.dense ? c.pages * 2 * kPageBytes : c.pages * 256 + kept * 2 * kPageBytes);
        const int layers = std::max<int>(8, (150'000'000 / least + 2) / 2 * 2);
        std::vector<char*> caches, metadata;
        for (int i = 0; i < layers; ++i) {
            caches.push_back(allocate<char>(cache_bytes));
            metadata.push_back(allocate<char>(pages * c.heads * 512));
        }
        std::vector<int> table(pages);
        for (size_t i = 0; i < pages; ++i) table[i] = i;
        uint64_t state = 1;
        for (size_t i = pages - 1; i > 0; --i) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            std::swap(table[i], table[(state >> 33) % (i + 1)]);
        }
        Params p{};
        int* device_table = allocate<int>(pages * 4, false);
        CHECK(cudaMemcpy(device_table, table.data(), pages * 4, cudaMemcpyHostToDevice));
        p.table = device_table;
        p.query = allocate<uint4>(size_t(c.rows) * query_heads * 256);
        uint32_t* words[2] = {allocate<uint32_t>(8 << 20, false), allocate<uint32_t>(8 << 20, false)};
        p.out = allocate<uint2>(size_t(c.rows) * query_heads * 256);
        p.rows = c.rows, p.heads = c.heads, p.group = query_heads / c.heads, p.pages = c.pages,
        p.kept = c.dense ? c.pages : kept;
        for (const int bits : c.dense ? std::vector<int>{0} : std::vector<int>{16, 8})
            for (const int stage : c.dense ? std::vector<int>{0, 2} : std::vector<int>{0, 1, 2})
                for (const int size_log2 : c.sizes_log2) {
                    float best = 1e30f;
                    const char* when = "";
                    for (const int start : {0, 1, 2, 3}) {
                        p.size_log2 = size_log2, p.stage = Stage(stage), p.start = Start(start);
                        const float us = microseconds(p, metadata, caches, words, bits, sms);
                        if (us < best) best = us, when = starts[start];
                    }
                    printf(
                        "%s  {\"case\": \"%s\", \"metadata\": %d, \"until\": \"%s\", \"team\": %d, \"next_starts\": "
                        "\"%s\", \"us\": %.2f}",
                        between, c.name, bits, stages[stage], 1 << size_log2, when, best);
                    fflush(stdout);
                    between = ",\n";
                }
        for (char* memory : caches) CHECK(cudaFree(memory));
        for (char* memory : metadata) CHECK(cudaFree(memory));
    }
    printf("\n ]\n}\n");
}
