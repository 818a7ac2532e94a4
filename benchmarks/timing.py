"""How a layer's call is timed: with caches as cold as in a real step, where other layers come between."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
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


def after_reading_us(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """As `graph_us`, with 256 MB read between the calls, as a decoder's weights are: without the time of that.

    Then a kernel's code and its small inputs are no longer in L2 either, and it cannot start while its like still runs.
    """
    weights, total = torch.zeros(2**26, device="cuda"), torch.empty((), device="cuda")

    def read() -> None:
        torch.sum(weights, 0, out=total)

    both = [step for call in calls for step in (read, call)]
    return 2 * graph_us(both, replays) - graph_us([read] * len(calls), replays)


def release_memory() -> None:
    """Gives torch's unused memory back to the GPU's driver, and waits, a second for 40 GB.

    The driver clears what it gets in the background: right after 40 GB had been freed, steps took 13% longer.
    """
    if torch.cuda.is_available():
        reserved = torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        time.sleep((reserved - torch.cuda.memory_reserved()) / 40e9)


def wall_us(calls: Sequence[Callable[[], object]], passes: int = 5) -> float:
    """Microseconds a call on the CPU, in the fastest pass through all of them: other load only adds to it."""
    evictor = torch.zeros(2**26)  # 256 MB, written before every pass: the calls' own data may fit a large L3
    calls[0]()
    best = float("inf")
    for _ in range(passes):
        evictor.add_(1)
        start = time.perf_counter()
        for call in calls:
            call()
        best = min(best, (time.perf_counter() - start) / len(calls) * 1e6)
    return best


def steps_us(steps: Sequence[Callable[[], object]], passes: int = 5) -> float:
    """Microseconds a step on the CPU, of steps that must follow one another: the mean of the fastest runs of each."""
    evictor = torch.zeros(2**26)  # as above, before every step
    best = [float("inf")] * len(steps)
    for number in range(passes + 1):
        for i, step in enumerate(steps):
            evictor.add_(1)
            start = time.perf_counter()
            step()
            if number > 0:
                best[i] = min(best[i], time.perf_counter() - start)
    return statistics.mean(best) * 1e6
