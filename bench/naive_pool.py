"""Baseline: the first thing one does about the slow cron, the same job in eight threads, a full sync each time.

Belongs here: that pool. Does not: the job (`bench.seed_loop`).
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from bench.fleet import Fleet, Member
from bench.seed_loop import Worked, Worker, worker

THREADS = 8


def run(fleet: Fleet, members: Sequence[Member]) -> Worked:
    """Sync workspaces in a pool; every thread keeps its connections."""
    mine = threading.local()
    workers: list[Worker] = []
    with ExitStack() as stack, ThreadPoolExecutor(THREADS) as pool:
        idle = [stack.enter_context(worker(fleet)) for _ in range(THREADS)]

        def sync(member: Member) -> None:
            if not hasattr(mine, "worker"):
                mine.worker = idle.pop()
                workers.append(mine.worker)
            mine.worker.sync(member)

        began = time.perf_counter()
        list(pool.map(sync, members))
        seconds = time.perf_counter() - began
    return Worked(len(members), sum(one.calls for one in workers), seconds)
