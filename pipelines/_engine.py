"""Build shards with processes of this machine, or with the workers of a Ray cluster.

Whatever ends a local run (Ctrl-C, SIGTERM, a killed driver, a killed worker), finished shards keep
their final names and no ffmpeg keeps running. All nodes of a cluster must see the raw videos under
the same path, and ``--out`` must be an address (s3://…) or a folder they share; a shard whose node
is lost is built again on another.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, replace
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines._build import ShardResult, Tally, build_shard
from pipelines._ffmpeg import (
    Interrupted,
    ffmpeg_binary,
    ffmpeg_version,
    go_on,
    kill_running,
    require_going,
    stop_running,
)
from pipelines._plan import ShardPlan
from pipelines._remote import spool_folder
from shards.errors import InputError
from shards.ray_cluster import MOST_RETRIES, connection, node_options, require_ray, run_tasks
from shards.signals import STOPPING, StopRequest, protected_children, unblock
from shards.terminal import say


def ray_engine(address: str | None, *, limited: bool) -> Callable[..., None]:
    """Return the counterpart of :func:`pipelines._engine.build_shards` for a Ray cluster.

    Args:
        address: of the cluster; None: ``RAY_ADDRESS``, the one this machine is in, or a new one
            on this machine alone.
        limited: whether ``workers`` is the user's limit; otherwise every CPU of the cluster works.

    Raises:
        InputError: Ray is not installed.
    """
    require_ray()
    return functools.partial(_build_shards, address=address, limited=limited)


def _build_shards(
    plans: Collection[ShardPlan],
    workers: int,
    on_shard: Callable[[ShardPlan, ShardResult], None],
    on_progress: Callable[[Tally], None],
    *,
    address: str | None,
    limited: bool,
) -> None:
    import ray

    with connection(address), stoppable():  # Ray sets a handler of its own for SIGTERM
        threads, most = _division(ray, len(plans), workers if limited else None)
        task = ray.remote(_build_on_node).options(
            num_cpus=threads, max_retries=MOST_RETRIES, retry_exceptions=False, **node_options()
        )

        def on_done(plan: ShardPlan, result: ShardResult) -> None:
            on_shard(plan, result)
            on_progress(_tally(plan, result))

        run_tasks(plans, lambda plan: task.remote(plan, threads), most, on_done, require_going)


def _division(ray: Any, shards: int, workers: int | None) -> tuple[int, int]:
    """Return threads per shard, and shards submitted at once."""
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    wanted = workers or max(1, sum(cpus))
    # With fewer shards than workers, threads share a shard, as many as fit on any node.
    threads = max(1, min(math.ceil(wanted / shards), min(filter(None, cpus), default=1)))
    at_once = max(1, wanted // threads)
    # Twice as many keep every CPU busy and let a cluster grow; a user's limit is kept.
    return threads, at_once if workers else 2 * at_once


def _build_on_node(plan: ShardPlan, threads: int) -> ShardResult:
    binary = plan.binary if Path(plan.binary).is_file() else ffmpeg_binary()
    found = ffmpeg_version(binary)
    if found != plan.ffmpeg_version:
        raise InputError(
            f"this node has ffmpeg {found}, the driver {plan.ffmpeg_version}: frames may differ",
            binary,
            "install the same imageio-ffmpeg everywhere",
        )
    # A node cannot know when the last of its shards is done: each clears up after itself.
    with spool_folder() as folder:
        spool = replace(plan.spool, folder=folder)
        return build_shard(replace(plan, binary=binary, spool=spool), lambda: threads)


def _tally(plan: ShardPlan, result: ShardResult) -> Tally:
    return Tally(
        videos=len(plan.videos),
        frames=result.info.frames,
        bytes=result.info.bytes,
        failures=len(result.exclusions),
    )


_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 5.0
_MOST_LOSSES = 3  # of workers, without a finished shard in between


def build_shards(
    plans: Collection[ShardPlan],
    workers: int,
    on_shard: Callable[[ShardPlan, ShardResult], None],
    on_progress: Callable[[Tally], None],
) -> None:
    """Build every plan; call ``on_shard`` as each is finished, in any order.

    Args:
        workers: videos decoded at once, over all processes.
        on_progress: called with the counts of newly processed videos.

    Raises:
        InputError: a shard cannot be written, or workers were killed repeatedly.
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, with all workers gone.
    """
    done: set[str] = set()

    def finished(plan: ShardPlan, result: ShardResult) -> None:
        on_shard(plan, result)
        done.add(plan.name)

    with stoppable() as stop:
        losses = 0
        while left := len(plans) - len(done):
            before = len(done)
            processes = min(workers, left)
            todo = (plan for plan in plans if plan.name not in done)
            try:
                if processes == 1:
                    for plan in todo:
                        finished(plan, build_shard(plan, lambda: workers, on_progress))
                        if stop:
                            raise Interrupted
                else:
                    _build_in_processes(todo, processes, workers, finished, on_progress, stop)
            except BrokenProcessPool as error:
                if stop:
                    raise Interrupted from error
                # Usually out of memory: unfinished shards are built again.
                losses = losses + 1 if len(done) == before else 1
                if losses == _MOST_LOSSES:
                    raise InputError(
                        f"workers were killed {losses} times, perhaps because memory ran out",
                        fix="run the same command again to resume, with fewer --workers",
                    ) from error
                say("a worker was killed: its shard is built again")


def _build_in_processes(
    plans: Iterable[ShardPlan],
    processes: int,
    workers: int,
    on_shard: Callable[[ShardPlan, ShardResult], None],
    on_progress: Callable[[Tally], None],
    stop: StopRequest,
) -> None:
    # Forking this process itself would copy its threads' locks.
    context = multiprocessing.get_context("forkserver")
    # Only packages: this one may lie where the server, unlike its children, would not search.
    context.set_forkserver_preload(["numpy", "PIL.Image", "ffmpeg", "msgspec", "simplejpeg"])
    with protected_children(held_back=True):
        resource_tracker.ensure_running()
    with protected_children(), _ignoring():  # inherited by all workers
        forkserver.ensure_running()
    counters: Any = context.Array("Q", len(astuple(Tally())))
    # Threads of each process. Without a lock, which a killed worker would keep.
    threads: Any = context.Value("i", math.ceil(workers / processes), lock=False)
    others = set(multiprocessing.active_children())
    told = list(counters)

    def tell() -> None:
        now = list(counters)
        if now != told:
            on_progress(Tally(*(new - old for new, old in zip(now, told, strict=True))))
            told[:] = now

    executor = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(counters, threads)
    )
    try:
        # Submit no more than there are processes: a waiting one could not be withdrawn.
        queue = iter(plans)
        running: dict[Future[ShardResult], ShardPlan] = {}
        while True:
            if stop:
                raise Interrupted
            for plan in itertools.islice(queue, processes - len(running)):
                with protected_children():
                    running[executor.submit(_work, plan)] = plan
            if not running:
                break
            # The last shards share the processors of those that are finished.
            threads.value = math.ceil(workers / len(running))
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            tell()
            for future in done:
                on_shard(running.pop(future), future.result())
    finally:
        # After an exception, workers are still building shards that nobody waits for.
        _end([child for child in multiprocessing.active_children() if child not in others])
        executor.shutdown(wait=True, cancel_futures=True)


def _end(children: list[Any]) -> None:
    for child in children:
        child.terminate()
    for child in children:
        child.join(_PATIENCE_SECONDS)
        if child.is_alive():
            child.kill()


_counters: Any = None
_threads: Any = None
_busy = False


def _start_worker(counters: Any, threads: Any) -> None:
    global _counters, _threads
    _counters, _threads = counters, threads
    # The driver ends its workers; only SIGTERM reaches them, and is its word.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_sigterm)
    threading.Thread(target=_die_with_driver, daemon=True).start()
    unblock()


def _work(plan: ShardPlan) -> ShardResult:
    global _busy
    _busy = True
    try:
        return build_shard(plan, lambda: int(_threads.value), _count)
    except Interrupted:
        # The shard's temporary file and its ffmpeg are gone by now.
        os._exit(128 + signal.SIGTERM)
    finally:
        _busy = False


def _count(tally: Tally) -> None:
    with _counters.get_lock():
        for place, count in enumerate(astuple(tally)):
            _counters[place] += count


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    if _busy:
        stop_running()
    else:
        os._exit(128 + signal.SIGTERM)


def _die_with_driver() -> None:
    """Exit if the driver is killed: workers must not write where its successor writes."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        kill_running()
        os._exit(1)


@contextlib.contextmanager
def _ignoring() -> Iterator[None]:
    """Let processes that are started in the block ignore Ctrl-C and a closed terminal."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    # Blocked as well: one that comes meanwhile is kept for this process, not ignored.
    numbers = [number for number in STOPPING if number != signal.SIGTERM]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    came = signal.sigpending() & set(numbers)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in came:
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Let a signal in the block stop every ffmpeg and set the request."""
    try:
        with StopRequest(at_once=stop_running, interrupts=False) as stop:
            yield stop
    finally:
        go_on()
