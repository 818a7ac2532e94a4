"""How kernels are timed: a CUDA graph over several layers' own pools, so that L2 is cold as in a real step."""

import statistics
from collections.abc import Callable

import torch


def graph_us(calls: list[Callable[[], object]], replays: int = 20) -> float:
    """Microseconds a call: median time of a CUDA graph of the calls, in their order, over their number."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times) / len(calls)
