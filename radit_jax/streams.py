"""Work that several threads do at once, so that one fills what another leaves idle.

On a CPU a compiled program keeps all cores busy only within its larger operations: between them, and in those that are too small to be
shared, some wait. Of two programs at once, each dispatched by a thread of its own, one has work for them: on two cores embedding takes 0.86
of the time, answering 0.84, scoring 0.91, with the same results (docs/speed.md). An accelerator runs one program after the other: there
asynchronous dispatch is enough.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jax.sharding import Mesh

T = TypeVar("T")
MOST = 2  # each holds the arrays of a call; a third one gains nothing on two cores
_END = object()


def count(mesh: Mesh) -> int:
    """How many threads are to call programs on this mesh at once.

    One where it has several devices: programs that exchange data have to be called in the same order on all.
    """
    alone = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return min(MOST, os.cpu_count() or 1) if alone else 1


def merged(parts: Sequence[Iterable[T]]) -> Iterator[T]:
    """What the parts yield, as it comes; each is read by a thread of its own, but for a single one.

    What a part raises is raised here, after the others have come to their next item. So has who stops reading to wait for them.
    """
    if len(parts) < 2:
        for part in parts:
            yield from part
        return
    found: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()

    def read(part: Iterable[T]) -> None:
        try:
            for item in part:
                found.put(item)
                if stop.is_set():
                    return
        except BaseException:
            stop.set()
            raise
        finally:
            found.put(_END)

    with ThreadPoolExecutor(len(parts), thread_name_prefix="stream") as pool:
        try:
            readers = [pool.submit(read, part) for part in parts]
            left = len(readers)
            while left:
                if (item := found.get()) is _END:
                    left -= 1
                else:
                    yield item
        finally:
            stop.set()
    for reader in readers:
        reader.result()


class Shared(Iterator[T]):
    """An iterator that several threads may read: each item goes to one of them."""

    def __init__(self, items: Iterable[T]):
        self._items, self._lock = iter(items), threading.Lock()

    def __next__(self) -> T:
        with self._lock:
            return next(self._items)
