"""How many threads torch gets on a CPU."""

import os
import time

import torch


def fastest_threads() -> int:
    """Return 1 or the number of cores (at most 8: networks of this size gain nothing by more), whichever is faster now.

    Threads wait for each other hundreds of times in an update, so beside other programs for whichever core is taken:
    one thread can then be thirty times as fast as two. Takes a tenth of a second, a few on a busy machine. Whoever sets
    OMP_NUM_THREADS gets what it says.
    """
    most = torch.get_num_threads()
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return most
    net = torch.nn.Sequential(*[torch.nn.Linear(128, 128), torch.nn.ELU()] * 5)
    batch = torch.ones(1280, 128)
    seconds = {}
    for threads in (1, min(most, 8)):
        torch.set_num_threads(threads)
        net(batch).mean().backward()  # starts the threads
        start = time.perf_counter()
        for _ in range(5):
            net(batch).mean().backward()
        seconds[threads] = time.perf_counter() - start
    return min(seconds, key=seconds.get)
