"""How long tasks take on a cluster: a discrete-event simulation, and a formula for the same.

A machine has processors; each takes the next task of a list, reads its input from storage that all share, computes, and
writes its output there. A machine that fails loses what its processors were at; these tasks run again first, and the
machine comes back after a while.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

READ, COMPUTE, WRITE = range(3)


@dataclass(frozen=True)
class Task:
    """``seconds`` of one processor, and the bytes that it reads before and writes after."""

    seconds: float
    read: float = 0.0
    written: float = 0.0


@dataclass(frozen=True)
class Machines:
    """``n`` machines with ``cores`` each on storage that gives ``storage`` bytes/s to all, ``network`` to one.

    A machine fails after ``mtbf`` seconds on average (None: never), its tasks start again ``detection`` seconds later,
    and it is back after ``repair``. ``overhead`` is what the driver needs for a task, one after the other.
    """

    n: int
    cores: int
    storage: float = float("inf")
    network: float = float("inf")
    mtbf: float | None = None
    detection: float = 15.0
    repair: float = 600.0
    overhead: float = 0.0

    @property
    def processors(self) -> int:
        return self.n * self.cores


@dataclass(frozen=True)
class Run:
    """``seconds`` until the last task ended, ``failures`` of machines, and tasks that ran ``again``."""

    seconds: float
    failures: int
    again: int


def simulate(tasks: Sequence[Task], machines: Machines, seed: int = 0) -> Run:
    """Run ``tasks`` in their order, each on the first processor that is free.

    All transfers of a moment get the same rate: an equal share of the storage, and no more than the share of one of a
    machine's processors in its network.
    """
    rng = random.Random(seed)
    state = _State(tasks, machines)
    events: list[tuple[float, int, str, int, int]] = []
    order = 0

    def push(at: float, kind: str, which: int, epoch: int) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (at, order, kind, which, epoch))

    def start_next(processor: int, now: float) -> None:
        if state.queue and state.up[processor // machines.cores]:
            state.driver = max(state.driver, now) + machines.overhead
            state.running[processor] = state.queue.popleft()
            push(state.driver, "begin", processor, state.epoch[processor])
        else:
            state.idle.add(processor)

    def fail_later(machine: int, now: float) -> None:
        if machines.mtbf is not None:
            push(now + rng.expovariate(1 / machines.mtbf), "fail", machine, 0)

    for processor in _spread(machines):
        start_next(processor, 0.0)
    for machine in range(machines.n):
        fail_later(machine, 0.0)
    now, failures, again, left = 0.0, 0, 0, len(tasks)
    while left:
        at = events[0][0] if events else float("inf")
        moved = state.next_transfer()
        if moved is not None and moved[0] <= at:
            state.move_to(moved[0])
            now = moved[0]
            processor, phase = state.end_transfer()
            if phase == READ:
                push(now + tasks[state.running[processor]].seconds, "computed", processor, state.epoch[processor])
                continue
            left -= 1
            start_next(processor, now)
            continue
        if at == float("inf"):
            raise ValueError("no machine is left")
        now, _, kind, which, epoch = heapq.heappop(events)
        state.move_to(now)
        if kind == "fail":
            failures += 1
            state.up[which] = False
            for processor in range(which * machines.cores, (which + 1) * machines.cores):
                state.epoch[processor] += 1
                state.idle.discard(processor)
                state.drop_transfer(processor)
                if processor in state.running:
                    again += 1
                    push(now + machines.detection, "requeue", state.running.pop(processor), 0)
            push(now + machines.repair, "repaired", which, 0)
        elif kind == "repaired":
            state.up[which] = True
            for processor in range(which * machines.cores, (which + 1) * machines.cores):
                start_next(processor, now)
            fail_later(which, now)
        elif kind == "requeue":
            state.queue.appendleft(which)
            if state.idle:
                start_next(state.idle.pop(), now)
        elif epoch == state.epoch[which]:
            if kind == "begin":
                state.begin_transfer(which, READ, tasks[state.running[which]].read)
            else:
                state.begin_transfer(which, WRITE, tasks[state.running[which]].written)
    return Run(now, failures, again)


def _spread(machines: Machines) -> list[int]:
    """All processors, one of each machine in turn."""
    return [machine * machines.cores + core for core in range(machines.cores) for machine in range(machines.n)]


class _State:
    """Who does what, and the transfers: each has got ``moved`` bytes since it began, at the rate of all."""

    def __init__(self, tasks: Sequence[Task], machines: Machines) -> None:
        self.machines = machines
        self.queue = deque(range(len(tasks)))
        self.up = [True] * machines.n
        self.epoch = [0] * machines.processors
        self.running: dict[int, int] = {}
        self.idle: set[int] = set()
        self.driver = 0.0
        self.moved, self.at = 0.0, 0.0
        self.transfers: list[tuple[float, int, int, int]] = []
        self.alive: dict[int, int] = {}
        self.serial = 0

    @property
    def rate(self) -> float:
        return min(self.machines.storage / max(1, len(self.alive)), self.machines.network / self.machines.cores)

    def move_to(self, now: float) -> None:
        if self.alive and now > self.at:
            self.moved += self.rate * (now - self.at)
        self.at = now

    def begin_transfer(self, processor: int, phase: int, nbytes: float) -> None:
        self.serial += 1
        self.alive[processor] = self.serial
        # with no limit there is no clock to wait for
        end = self.moved + (nbytes if self.rate < float("inf") else 0.0)
        heapq.heappush(self.transfers, (end, self.serial, processor, phase))

    def drop_transfer(self, processor: int) -> None:
        self.alive.pop(processor, None)

    def next_transfer(self) -> tuple[float, int] | None:
        """(when, processor) of the transfer that ends first."""
        while self.transfers and self.alive.get(self.transfers[0][2]) != self.transfers[0][1]:
            heapq.heappop(self.transfers)
        if not self.transfers:
            return None
        rest = max(0.0, self.transfers[0][0] - self.moved)
        return self.at + (rest / self.rate if rest else 0.0), self.transfers[0][2]

    def end_transfer(self) -> tuple[int, int]:
        end, _, processor, phase = heapq.heappop(self.transfers)
        self.moved = max(self.moved, end)
        del self.alive[processor]
        if phase == WRITE:
            del self.running[processor]
        return processor, phase


def predict(tasks: Sequence[Task], machines: Machines) -> float:
    """Seconds, by a formula.

    Processors compute or move bytes: a closed queueing network of P customers, one station where each thinks for the
    mean time of a task and one that they share, whose throughput has a product form. Then half of the smallest task's
    time passes on average until the last processor is done. A machine that fails loses half a task on each processor
    and the time that it is away; how long that is depends on how long the run is.
    """
    processors, n_tasks = min(machines.processors, len(tasks)), len(tasks)
    alone = machines.network / machines.cores
    mean = sum(task.seconds for task in tasks) / n_tasks
    moved = sum(task.read + task.written for task in tasks) / n_tasks
    busy = n_tasks / throughput(processors, mean, moved / alone, moved / machines.storage)
    if machines.mtbf is not None:
        lost = busy * processors / n_tasks / 2 / machines.mtbf
        whole = busy
        for _ in range(20):
            busy = whole / (_share_of_time_up(machines.mtbf, machines.repair, busy) * max(1 - lost, 1e-3))
    if n_tasks > processors:
        busy += min(task.seconds for task in tasks) / 2
    longest = max(task.seconds + (task.read + task.written) / min(alone, machines.storage) for task in tasks)
    return max(busy, longest, n_tasks * machines.overhead)


def throughput(processors: int, think: float, alone: float, shared: float) -> float:
    """Tasks a second of ``processors`` that compute for ``think`` seconds and then move bytes in turn.

    Moving takes one of them ``alone`` seconds at the least, and all together ``shared`` seconds a task. The numbers of
    those that move are a birth-death process, whatever the distribution of the times.
    """
    if think == 0 or max(alone, shared) == 0:
        return min(processors / (think + alone), 1 / shared if shared else math.inf)
    rates = [
        min(n / alone if alone else math.inf, 1 / shared if shared else math.inf) for n in range(1, processors + 1)
    ]
    logs = [0.0]
    for n, rate in enumerate(rates):
        logs.append(logs[-1] + math.log((processors - n) / think) - math.log(rate))
    largest = max(logs)
    weights = [math.exp(log - largest) for log in logs]
    return sum(w * rate for w, rate in zip(weights[1:], rates, strict=True)) / sum(weights)


def _share_of_time_up(mtbf: float, repair: float, seconds: float) -> float:
    """Of the first ``seconds`` of a machine that works at first, with exponential times to fail and to be repaired."""
    rate = 1 / mtbf + 1 / repair
    always = mtbf / (mtbf + repair)
    return always + (1 - always) * -math.expm1(-rate * seconds) / (rate * seconds)
