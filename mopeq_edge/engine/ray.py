"""Tasks on a Ray cluster, one processor each: a bounded number at a time, again where a machine was lost."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from mopeq_edge import errors
from mopeq_edge.engine.interface import R, T, Work
from mopeq_edge.engine.worker import Versions, versions
from mopeq_edge.errors import ClusterError, ExtraMissingError, printable
from mopeq_edge.source.model import Source

if TYPE_CHECKING:
    import ray

PART_WEIGHTS = 2**25
"""Weights of one task, at most (one matrix at least): minutes of work, which is what a lost machine costs."""

AHEAD = 1.25
"""Tasks in flight for each processor, so that none waits for the next one."""

ATTEMPTS = 4
"""Of one task, if its machine is lost each time: then it is the task that brings machines down."""

CONNECT_SECONDS = 5.0

LOOK_AGAIN_SECONDS = 5.0
"""Between two looks at how many processors there are."""


SETTINGS: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "(?s).*",
    "RAY_worker_niceness": "0",
}
"""Of Ray: nothing is reported to anybody, no message of its own comes on stdout, where ``--json`` writes, and workers
of a cluster that we start are as urgent as we are."""

STORE_BYTES = 2**28
"""Of a cluster of this machine alone: what lies there are tasks, not weights."""


@dataclass
class _Sent:
    """One task in flight."""

    number: int
    payload: bytes
    attempts: int = 1


class RayEngine:
    """The cluster at an address; see :func:`connected`."""

    def __init__(self, ray: Any, note: Callable[[str], None], part_weights: int = PART_WEIGHTS) -> None:
        self._ray, self._note = ray, note
        self.part_weights = part_weights
        self._expected: Versions = versions()
        self._run = ray.remote(num_cpus=1, max_retries=0)(_task())
        self._shared: tuple[Source, ray.ObjectRef[bytes]] | None = None
        self.look_again()

    def look_again(self) -> None:
        """Count the processors anew before the next task: the cluster is known to have changed."""
        self._looked, self._processors = -math.inf, 0

    def map(
        self, work: Work[T, R], source: Source, tasks: Iterable[T], advance: Callable[[float], None]
    ) -> Iterator[tuple[int, R]]:
        """``work`` of every task, in the order in which they end; see :class:`~mopeq_edge.engine.interface.Engine`.

        Raises what a task raised, with the machine's name, and :class:`ClusterError` for a cluster that cannot do it.
        """
        from ray import cloudpickle

        waiting: dict[Any, _Sent] = {}
        ended: SimpleQueue[tuple[Any, Future[Any]]] = SimpleQueue()
        left = enumerate(tasks)
        more = True
        try:
            while True:
                while more and len(waiting) < self._most_in_flight():
                    found = next(left, None)
                    more = found is not None
                    if found is not None:
                        sent = _Sent(found[0], cloudpickle.dumps((work, found[1])))
                        waiting[self._send(source, sent, ended)] = sent
                if not waiting:
                    return
                try:
                    # not ray.wait, which swallows what a signal raises
                    reference, future = ended.get(timeout=LOOK_AGAIN_SECONDS)
                except Empty:
                    continue
                sent = waiting.pop(reference)
                answer = self._answer(future, sent)
                if answer is None:
                    sent.attempts += 1
                    waiting[self._send(source, sent, ended)] = sent
                    continue
                result, units = answer
                advance(units)
                yield sent.number, result
        finally:
            for reference in waiting:
                with suppress(Exception):
                    self._ray.cancel(reference, force=True)

    def _send(self, source: Source, sent: _Sent, ended: SimpleQueue[tuple[Any, Future[Any]]]) -> Any:
        reference = self._run.remote(self._expected, [self._share(source)], sent.payload)
        reference.future().add_done_callback(lambda future: ended.put((reference, future)))
        return reference

    def _share(self, source: Source) -> Any:
        """The reference of ``source``: names and places, no weights."""
        from ray import cloudpickle

        if self._shared is None or self._shared[0] is not source:
            self._shared = source, self._ray.put(cloudpickle.dumps(source))
        return self._shared[1]

    def _most_in_flight(self) -> int:
        now = time.monotonic()
        if now - self._looked > LOOK_AGAIN_SECONDS:
            self._looked, self._processors = now, int(self._ray.cluster_resources().get("CPU", 0))
            if self._processors == 0:
                self._note("note: the cluster has no processor now; waiting for one (Ctrl-C to stop)")
        return max(1, int(AHEAD * self._processors))

    def _answer(self, ended: Future[Any], sent: _Sent) -> tuple[Any, float] | None:
        """(result, units) of a task that has ended; None if it has to run again."""
        problems = self._ray.exceptions
        lost = (
            problems.WorkerCrashedError,
            problems.NodeDiedError,
            problems.ObjectLostError,
            problems.OutOfMemoryError,
            problems.LocalRayletDiedError,
        )
        try:
            machine, state, result, units = ended.result()
        except lost as problem:
            reason = type(problem).__name__
            if sent.attempts >= ATTEMPTS:
                raise ClusterError(
                    f"task {sent.number} lost its machine {ATTEMPTS} times, the last time by {reason}; expected one "
                    "that stays: see Ray's logs there (memory is the usual reason)"
                ) from None
            self._note(f"note: task {sent.number} lost its machine ({reason}); it runs again")
            return None
        except problems.RaySystemError as problem:
            raise ClusterError(f"the cluster failed: {printable(str(problem), 300)}") from None
        if state != "done":
            kind = getattr(errors, state, ClusterError)
            raise kind(f"machine {machine}: {result}")
        return result, units


def _task() -> Callable[..., Any]:
    """What Ray sends: a function that needs nothing but Python until it knows that mopeq-edge is there."""

    def run(expected: Any, source: Any, payload: bytes) -> Any:
        import socket
        import sys

        machine = socket.gethostname()
        try:
            from mopeq_edge.engine.worker import run_task
        except ImportError as error:
            said = f"Python at {sys.executable} cannot import mopeq-edge ({error}); install it there, as here"
            return machine, "ClusterError", said, 0.0
        return machine, *run_task(expected, source, payload)

    return run


def _require_listener(address: str) -> None:
    """Ray itself tries for minutes. ``auto`` and ``local`` are no address."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"--address {address}: nothing answers there ({error}); start a cluster with ray start --head, and see "
            "docs/cluster.md"
        ) from None


@contextmanager
def connected(
    address: str | None, note: Callable[[str], None], part_weights: int = PART_WEIGHTS
) -> Iterator[RayEngine]:
    """The cluster at ``address`` (``auto``: of this machine; None: a new one of this machine alone, for the block).

    Raises :class:`ExtraMissingError` without Ray, :class:`ClusterError` if there is no cluster or it is of another
    version.
    """
    if address is not None and "://" in address:
        raise ClusterError(
            f"--address {address}: expected HOST:PORT or auto, found a URL; run mopeq-edge on a machine of the "
            "cluster, which sees the storage that the others see"
        )
    if address is not None:
        _require_listener(address)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise ExtraMissingError("--engine ray: needs Ray; run: pip install 'mopeq-edge[ray]'") from None
    in_main = threading.current_thread() is threading.main_thread()
    terminated = signal.getsignal(signal.SIGTERM)
    already = ray.is_initialized()
    try:
        if not already:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(
                    address="local" if address is None else address,
                    log_to_driver=False,
                    logging_level="CRITICAL",
                    **({"include_dashboard": False, "object_store_memory": STORE_BYTES} if address is None else {}),
                )
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as problem:
        said = printable(str(problem).strip(), 300)
        raise ClusterError(
            f"--address {address}: no Ray cluster that can be used ({said}); start one with ray start --head, and see "
            "docs/cluster.md"
        ) from None
    finally:
        if in_main and terminated is not None:
            # Ray has its own for SIGTERM, which does not clean up
            signal.signal(signal.SIGTERM, terminated)
    try:
        yield RayEngine(ray, note, part_weights)
    finally:
        if not already:
            ray.shutdown()
