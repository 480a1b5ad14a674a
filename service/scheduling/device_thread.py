"""The device thread: all device work of a replica runs here, never on the event loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

logger = logging.getLogger("farsight")


def side_pool(count: int, name: str) -> ThreadPoolExecutor:
    """Threads beside the device's, each on one core.

    All are started here, before the device thread sets its own number: MKL has one number of threads for the process,
    the last that any thread has set.
    """
    meeting = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        meeting.wait()

    pool = ThreadPoolExecutor(count, name, initializer=begin)
    for _ in range(count):
        pool.submit(int)
    meeting.wait()
    return pool


Task = Callable[[], None]


class Executor:
    """Runs one task after another on a thread of its own; the thread takes the next one itself, the moment it is free.

    `next_task` is called with `condition` held, which guards whatever it reads; None: nothing to do until `wake`.
    Tasks hand over their own results and errors. If one raises nevertheless, the thread ends and `on_death` is called.
    """

    def __init__(self, cpu_threads: int, next_task: Callable[[], Task | None], on_death: Callable[[], None]) -> None:
        self.condition = threading.Condition()
        self._cpu_threads = cpu_threads
        self._next_task, self._on_death = next_task, on_death
        self._stops = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stops

    def wake(self) -> None:
        """There may be work; called with `condition` held."""
        self.condition.notify()

    def stop(self) -> None:
        """Finish what there is to do, then end the thread."""
        with self.condition:
            self._stops = True
            self.condition.notify()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._cpu_threads)
        try:
            while (task := self._wait()) is not None:
                task()
                del task  # or its tensors would stay until the next one comes
        except Exception as error:
            logger.critical("the device thread ends", exc_info=error)
        finally:
            self._on_death()

    def _wait(self) -> Task | None:
        with self.condition:
            while (task := self._next_task()) is None and not self._stops:
                self.condition.wait()
            return task
