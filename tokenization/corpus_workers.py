"""Work items run in this process, in a pool of processes, or on a Dask cluster; the results are the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from itertools import islice
from multiprocessing import connection
from typing import Any, TypeVar

from screformer.tokenization.freed_memory import return_columns

Item = TypeVar("Item")
Result = TypeVar("Result")

# Every process works on one item at a time; its libraries would start as many threads as the machine has cores.
THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
CONNECT_SECONDS = 10
SECONDS_TO_END = 5
GO_ON = "What is finished is kept: call it again with the same arguments to go on."


class Workers:
    """Who does the work; to be used in a `with` statement, and as often as needed within it.

    Parameters
    ----------
    num_workers
        Processes of this machine; 1 is this process itself.
    scheduler
        Address of a Dask scheduler instead, such as "tcp://10.0.0.1:8786".

    Raises
    ------
    ValueError
        `num_workers` is not positive.
    """

    def __init__(self, num_workers: int = 1, scheduler: str | None = None) -> None:
        if num_workers < 1:
            msg = f"num_workers: at least 1, got {num_workers}"
            raise ValueError(msg)
        self.num_workers = num_workers
        self.scheduler = scheduler
        self._open = ExitStack()
        self._pool: ProcessPoolExecutor | None = None
        self._client: Any = None  # distributed's, which is optional

    def __enter__(self) -> Workers:
        """Return itself; workers are started when they are first needed."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """End the workers of this machine, or the connection to the others."""
        if self._pool is not None and kind is not None and issubclass(kind, KeyboardInterrupt):
            _end(self._pool)
        self._open.close()

    @property
    def is_this_process(self) -> bool:
        """Whether there are no workers but this process."""
        return self.scheduler is None and self.num_workers == 1

    def run(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[Result, None, None]:
        """Yield `function(item)` of every item, in the order in which they are done; once closed, nothing runs.

        Parameters
        ----------
        function
            Of a module, so that another process can import it.
        items
            What can be pickled.

        Raises
        ------
        ChildProcessError
            A worker died, as when the system ran out of memory.
        ConnectionError
            No scheduler answers.
        ImportError
            `distributed` is not installed.
        Exception
            What `function` raises.
        """
        if not items:
            return
        if self.scheduler is not None:
            yield from self._run_on_dask(function, items, self.scheduler)
        elif self.num_workers == 1 or (len(items) == 1 and self._pool is None):
            yield from map(function, items)
        else:
            yield from self._run_in_pool(function, items)

    def _run_in_pool(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[Result, None, None]:
        if self._pool is None:
            self._open.enter_context(_environment(dict.fromkeys(THREAD_SETTINGS, "1")))
            # "spawn": a fork would copy locks and threads of libraries in whatever state they are.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.num_workers, context, initializer=_begin_worker)
            self._open.callback(self._pool.shutdown, cancel_futures=True)
        waiting = iter(items)
        # Two items a worker: none waits, and memory does not grow with the number of items.
        running = {self._pool.submit(_call, function, item) for item in islice(waiting, 2 * self.num_workers)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield _result(future)
                running |= {self._pool.submit(_call, function, item) for item in islice(waiting, len(done))}
        except KeyboardInterrupt:
            _end(self._pool)  # an item may take minutes
            raise
        finally:
            for future in running:
                future.cancel()
            wait(running)

    def _run_on_dask(
        self, function: Callable[[Item], Result], items: Sequence[Item], address: str
    ) -> Generator[Result, None, None]:
        try:
            from distributed import as_completed
            from distributed.scheduler import KilledWorker
        except ImportError as error:
            msg = 'scheduler: needs Dask. Install it here and on the workers: pip install "screformer[distributed]"'
            raise ImportError(msg) from error
        if self._client is None:
            self._client = self._open.enter_context(_connect(address))
        # Not "pure": a result of an earlier run must not stand for the file that this run is to write.
        futures = self._client.map(function, items, pure=False)
        try:
            for future in as_completed(futures, loop=self._client.loop):
                yield future.result()
        except KilledWorker as error:
            msg = f"scheduler: several workers died on one item, perhaps for want of memory ({error}). {GO_ON}"
            raise ChildProcessError(msg) from error
        finally:
            self._client.cancel(futures)


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        msg = (
            "num_workers: a worker process died; perhaps the system ended it because memory was short (use fewer "
            "workers), or a script that is no module started it (put its calls under `if __name__ == '__main__':`). "
            f"{GO_ON}"
        )
        raise ChildProcessError(msg) from error


def _end(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool now: first let them remove their temporary files and end their own children."""
    processes = list((pool._processes or {}).values())
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(SECONDS_TO_END)
        process.kill()


class _Ending:
    """Whether this worker was told to end."""

    is_asked = False

    @classmethod
    def ask(cls, *_: object) -> None:
        cls.is_asked = True
        raise SystemExit(1)


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    """Do an item; the pool hands out the next ones even after a SystemExit."""
    if _Ending.is_asked:
        raise SystemExit(1)
    return function(item)


def _begin_worker() -> None:
    """Make a worker end when the process that started it does, even by force: it would wait for items forever."""
    import pyarrow as pa

    return_columns()
    pa.set_cpu_count(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    signal.signal(signal.SIGTERM, _Ending.ask)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _connect(address: str) -> Any:  # distributed's Client
    from distributed import Client

    try:
        return Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        msg = f"scheduler: no Dask scheduler answers at {address!r} ({error}); start one with `dask scheduler`"
        raise ConnectionError(msg) from error


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables, which child processes inherit, for a while."""
    before: dict[str, Any] = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
