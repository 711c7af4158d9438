"""The model's thread: requests come in a row and are answered one after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from mopeq_edge.errors import MopeqError
from mopeq_edge.serving.engine import CancelledError, Engine, Files
from mopeq_edge.serving.events import Event
from mopeq_edge.serving.refusal import BROKEN, RefusalError
from mopeq_edge.serving.requests import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class Job:
    """A request; ``deliver`` is called in the model's thread with every event, then with None or why there is none."""

    request: ChatRequest | CompletionRequest
    deliver: Callable[[Event | RefusalError | None], object]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Loads the model in a thread of its own; raises what that raises."""

    def __init__(self, files: Files) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._loaded = threading.Event()
        self._failed: BaseException | None = None
        self.n_ctx = 0
        self._thread = threading.Thread(target=self._run, args=(files,), name="model", daemon=True)
        self._thread.start()
        # in steps, so that Ctrl-C is heard
        while not self._loaded.wait(0.1):
            pass
        if self._failed is not None:
            raise self._failed

    def submit(self, job: Job) -> None:
        """Put ``job`` behind those that wait."""
        self._jobs.put(job)

    def stop(self, seconds: float) -> bool:
        """End the thread behind what it does now, and say whether it ended in time."""
        self._jobs.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, files: Files) -> None:
        try:
            engine = Engine(files)
        except BaseException as error:
            self._failed = error
            self._loaded.set()
            return
        self.n_ctx = engine.n_ctx
        self._loaded.set()
        while (job := self._jobs.get()) is not None:
            _answer(engine, job)
        engine.close()


def _answer(engine: Engine, job: Job) -> None:
    end: RefusalError | None = None
    try:
        if job.cancelled.is_set():
            return
        for event in engine.answer(job.request, job.cancelled.is_set):
            job.deliver(event)
    except CancelledError:
        return
    except RefusalError as error:
        end = error
    except MopeqError as error:
        end = RefusalError(str(error), status=BROKEN)
    # a mistake of ours in one request must not end the server for the others
    except Exception as error:
        end = RefusalError(f"{type(error).__name__}: {error}", status=BROKEN)
    # at the very end there may be nobody who could be told
    with suppress(RuntimeError):
        job.deliver(end)
