"""Where questions wait: those that are there when the models are free are answered together, by the one thread that uses the models."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from radit_jax.data.questions import Question

Answerer = Callable[[Sequence[Question]], list[dict[str, Any]]]


class Busy(Exception):
    """As many questions wait as there is room for."""


class Desk:
    """Takes questions from any number of callers of one event loop and answers at most `together` of them at once."""

    def __init__(self, answer: Answerer, *, together: int = 8, room: int = 32):
        self._answer, self._together, self._room = answer, together, room
        self._waiting: collections.deque[tuple[Question, Future]] = collections.deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="models")

    async def ask(self, asked: Question) -> dict[str, Any]:
        """The answer to one question; what `answer` raises for it. Raises Busy."""
        if len(self._waiting) >= self._room:
            raise Busy
        future: Future = Future()
        self._waiting.append((asked, future))
        self._thread.submit(self._next)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Nothing is begun any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _next(self) -> None:
        """Answers what waits now. What is asked meanwhile comes with the next call; a call that finds nothing has been served by others."""
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._together))]
        batch = [(asked, future) for asked, future in batch if future.set_running_or_notify_cancel()]
        if batch:
            self._serve(batch)

    def _serve(self, batch: list[tuple[Question, Future]]) -> None:
        try:
            answers = self._answer([asked for asked, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for one in batch:  # a question that cannot be answered is not to spoil those beside it
                self._serve([one])
            return
        for (_, future), answer in zip(batch, answers):
            future.set_result(answer)
