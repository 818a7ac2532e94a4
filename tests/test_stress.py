"""Tens of thousands of one-launch steps. Blocks that wait for each other could wait forever, so each test is a process
of its own with a time limit: a hang fails instead of blocking."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import FP8, INT4, assert_same_bits
from decode_problem import Problem, assert_close, new_workspace

import quest_ops

HAS_TEAMS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_TEAMS, reason="needs compute capability 9.0")]

LIMIT = 120  # seconds; a test takes about 6
LAUNCHES = 10_000


def run_alone(scenario, **environment):
    """In a process of its own, which ends well within the limit."""
    command = [sys.executable, __file__, scenario.__name__]
    environment = os.environ | {"PYTHONPATH": str(Path(quest_ops.__file__).parents[1])} | environment
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        subprocess.run(command, env=environment, timeout=LIMIT, check=True, **options)
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"{scenario.__name__} hangs: it ran past {LIMIT} s\n{(expired.output or b'').decode()}")
    except subprocess.CalledProcessError as failed:
        pytest.fail(f"{scenario.__name__} failed\n{failed.output.decode()}")


class GrowingDecode:
    """A decoder of five layers, each with pools of its own, that advances by itself: all it needs is on the device."""

    def __init__(self, tokens, device="cuda"):
        lengths = [1, 15, 500, 40]
        capacity = -(-(max(lengths) + tokens) // 16) * 16
        sizes = {"max_pages": capacity // 16, "device": device}
        formats = (None, FP8, None, FP8, INT4)
        self.layers = [Problem(lengths, 8, 4, metadata_dtype=f, seed=i, **sizes) for i, f in enumerate(formats)]
        self.lens = self.layers[0].lens
        for layer in self.layers:
            layer.table, layer.lens = layer.blocks.int(), self.lens
        self.tokens = self.layers[0].random(67, 2, len(lengths), 8, 128)  # keys and values of 67 steps
        self.time = torch.zeros(1, dtype=torch.int64, device=device)
        self.workspace = new_workspace(device)

    def step(self):
        """One token more for every sequence; returns each layer's (out, lse)."""
        key, value = self.tokens.index_select(0, self.time % len(self.tokens))[0]
        place = self.lens.long()[:, None]
        self.lens += 1
        results = []
        for layer in self.layers[:2]:
            slots = layer.blocks.gather(1, place // 16) * 16 + place % 16
            quest_ops.append_paged_kv(key, value, layer.k, layer.v, layer.metadata, slots.squeeze(1))
            results.append(layer.fused(32, workspace=self.workspace))
        results += [layer.step(key, value, 32, workspace=self.workspace) for layer in self.layers[2:]]
        self.time += 1
        return results

    def check(self, results):
        for layer, result in zip(self.layers, results, strict=True):
            assert_close(result, layer.separate(32))

    def check_metadata(self):
        for layer in self.layers:
            fresh = torch.empty_like(layer.metadata)
            fresh.view(torch.uint8).fill_(0xFF)  # as pages without a token still are
            quest_ops.update_page_metadata(layer.k, fresh, layer.table, self.lens, torch.zeros_like(self.lens))
            assert_same_bits(layer.metadata, fresh)


def replays_of_a_graph():
    decode = GrowingDecode(LAUNCHES + 2)
    decode.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = decode.step()
    for replay in range(LAUNCHES):
        graph.replay()
        if replay % 997 == 0 or replay == LAUNCHES - 1:
            decode.check(results)
    assert decode.lens.tolist() == [n + LAUNCHES + 1 for n in (1, 15, 500, 40)]
    decode.check_metadata()
    assert not decode.workspace.any()


class Mixture:
    """Five kinds of steps: teams of 16 and of 4, more teams than fit, shortlists, dense attention; of the first also
    with its append, which writes what is there. One stream at a time."""

    def __init__(self, seed, device="cuda"):
        sizes = {"seed": seed, "device": device}
        self.problems = [
            Problem([5000], 8, 4, **sizes),
            Problem([2000, 1, 900, 0], 8, 4, metadata_dtype=FP8, **sizes),
            Problem([900] * 19 + [0], 8, 4, metadata_dtype=INT4, **sizes),
            Problem([40_000], 2, 4, page=8, metadata_dtype=FP8, **sizes),
        ]
        first = self.problems[0]
        last = first.lengths.long() - 1
        place = first.blocks[0, last // 16], last % 16
        self.own = first.k[place], first.v[place]
        self.expected = [problem.separate(24) for problem in self.problems] + [first.dense(), first.separate(24)]
        self.workspace = new_workspace(device)

    def launch(self):
        results = [problem.fused(24, workspace=self.workspace) for problem in self.problems]
        first = self.problems[0]
        return results + [first.dense(workspace=self.workspace), first.step(*self.own, 24, workspace=self.workspace)]

    def check(self, results):
        for result, expected in zip(results, self.expected, strict=True):
            assert_close(result, expected)
        assert not self.workspace.any()


def two_streams():
    """Each launches from a thread of its own, then both replay graphs, so that the chip is never without either."""
    mixtures = [Mixture(seed) for seed in range(2)]
    streams = [torch.cuda.Stream() for _ in mixtures]
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(streams[i]):
            for _ in range(LAUNCHES // 4):
                results = mixtures[i].launch()
        streams[i].synchronize()
        return results

    with ThreadPoolExecutor(2) as threads:
        for mixture, results in zip(mixtures, threads.map(work, range(2)), strict=True):
            mixture.check(results)

    graphs = [torch.cuda.CUDAGraph() for _ in mixtures]
    captured = []
    for graph, mixture in zip(graphs, mixtures, strict=True):
        with torch.cuda.graph(graph):
            for _ in range(25):
                results = mixture.launch()
        captured.append(results)
    for _ in range(LAUNCHES // 100):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for mixture, results in zip(mixtures, captured, strict=True):
        mixture.check(results)


def beside_long_kernels():
    """One that takes a place on an SM for half a second, then others that take the whole chip."""
    mixture, other = Mixture(0), torch.cuda.Stream()
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(1_000_000_000)
    for _ in range(200):
        results = mixture.launch()
    torch.cuda.synchronize()
    mixture.check(results)
    with torch.cuda.stream(other):
        for _ in range(100):
            product = matrix @ matrix
    for _ in range(500):
        results = mixture.launch()
    torch.cuda.synchronize()
    assert product.isfinite().all()
    mixture.check(results)


def one_launch_after_another():
    """Under CUDA_LAUNCH_BLOCKING=1, where a launch returns when its kernel has ended."""
    assert os.environ["CUDA_LAUNCH_BLOCKING"] == "1"
    mixture = Mixture(0)
    for _ in range(250):
        results = mixture.launch()
    mixture.check(results)


def test_thousands_of_replays_over_growing_lengths():
    run_alone(replays_of_a_graph)


def test_two_streams_do_not_wait_for_each_other():
    run_alone(two_streams)


def test_steps_end_beside_long_kernels():
    run_alone(beside_long_kernels)


def test_steps_end_under_launch_blocking():
    run_alone(one_launch_after_another, CUDA_LAUNCH_BLOCKING="1")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
