"""Kill every stage at random moments and at chosen writes, fill its disk, interrupt it; then run it again and compare.

``python -m tools.crash_test --work-dir DIR --json FIGURES`` makes random models of half a million weights. Each stage
runs undisturbed twice, from the state that the stages before it left, which must give the same bytes. Then, from the
same state, it is

- killed (SIGKILL) at ``--kills`` times drawn over the undisturbed run's duration,
- killed before, and in the middle of, ``--points`` of its writes, renames and syncs (:mod:`tools.crash_points`),
- given a full disk from as many of its writes on,
- sent SIGINT at ``--interrupts`` times: how long it then takes to end is measured.

After each: files under final names are the old or the new ones, whole, and those that belong together are of one kind;
no input has changed; the same command, run again, gives every byte of the undisturbed run and leaves nothing else
(times in study.csv aside).
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import hashlib
import importlib
import io
import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.crash_points import FULL, KILL, TORN, Points, counted, in_child

UNCOMPARED = ("hashes.json",)
"""Hashes of the source's files with their times: a cache, which a killed run may or may not have written."""
GB = "0.00085"
LONGEST_SECONDS = 120
"""A run that takes longer does not end."""
SPLIT = ("--split-max-size", "600K")
TRACE = ("--trace", "--probes", "2", "--trace-chunks", "1")


OLMOE, SCRIPT, VISION = "olmoe", "script", "vision"
"""Models: one of ours, one that llama.cpp's script converts, one that sees pictures."""


@dataclass(frozen=True)
class Stage:
    """``command`` gets (model, text, run folder); ``after`` is the stage whose final state it starts from.

    ``together``: files of which a reader opens the first; where that is there, the others are as old as it.
    """

    name: str
    command: Callable[[Path, Path, Path], list[str]]
    after: str | None = None
    model: str = OLMOE
    together: tuple[str, ...] = ()


def _work(run: Path) -> list[str]:
    return ["--work-dir", str(run / "work"), "--threads", "2"]


def _calibrate(model: Path, text: Path, run: Path) -> list[str]:
    return ["calibrate", str(model), "--text", str(text), "--window", "64", "--chunks", "3", *_work(run)]


def _emit(*more: str) -> Callable[[Path, Path, Path], list[str]]:
    return lambda model, _, run: ["emit", str(model), str(run / "out.gguf"), *more, "--force", *_work(run)]


def _plan(*more: str) -> Callable[[Path, Path, Path], list[str]]:
    return lambda model, _, run: ["plan", str(model), "--target-gb", GB, *more, *_work(run)]


def _convert(model: Path, text: Path, run: Path) -> list[str]:
    return [
        *(
            "convert",
            str(model),
            str(run / "out.gguf"),
            "--text",
            str(text),
            "--target-gb",
            GB,
            "--force",
            "--no-report",
        ),
        *("--window", "64", "--chunks", "3", "--layout", "per-expert", *_work(run)),
    ]


def _convert_vision(kind: str) -> Callable[[Path, Path, Path], list[str]]:
    return lambda model, text, run: [
        *("convert", str(model), str(run / "out.gguf"), "--text", str(text), "--target-bpw", "6", "--pre", "gpt-2"),
        *("--window", "64", "--chunks", "2", "--no-evaluate", "--vision-type", kind, "--force", *_work(run)),
    ]


def _evaluate(model: Path, text: Path, run: Path) -> list[str]:
    common = ["--against", str(model), "--text", str(text), "--ctx", "64", "--chunks", "12"]
    return ["evaluate", str(run / "out.gguf"), *common, *_work(run)]


def _study(model: Path, text: Path, run: Path) -> list[str]:
    return [
        *("study", str(model), "--text", str(text), "--eval-text", str(text), "--budgets", GB, "--windows", "4"),
        *("--eval-ctx", "64", "--window", "64", "--chunks", "3", "--controls", "uniform,inverse", "--seeds", "0"),
        *("--sensitivities", "fisher", "--planners", "knapsack", *_work(run)),
    ]


PARTS = tuple(f"out-0000{number}-of-00002.gguf" for number in (1, 2))
SEEING = ("out.vision.onnx", "out.vision.onnx.data")

STAGES = (
    Stage("calibrate", _calibrate),
    Stage("calibrate --trace", lambda m, t, r: [*_calibrate(m, t, r), *TRACE]),
    Stage("sensitivity", lambda m, _, r: ["sensitivity", str(m), *_work(r)], "calibrate"),
    Stage("plan", _plan(), "sensitivity"),
    Stage("plan, per-expert", _plan("--layout", "per-expert"), "sensitivity"),
    Stage("plan, split", _plan(*SPLIT), "sensitivity"),
    Stage("emit", _emit(), "plan"),
    Stage("emit --split-max-size", _emit(*SPLIT), "plan, split", together=PARTS),
    Stage("emit, per-expert", _emit(), "plan, per-expert"),
    Stage("evaluate", _evaluate, "emit"),
    Stage("convert", _convert),
    Stage("study", _study, "calibrate"),
    Stage("convert with vision", _convert_vision("F16"), model=VISION, together=SEEING),
    Stage("convert, other vision", _convert_vision("INT8"), "convert with vision", model=VISION, together=SEEING),
    Stage("calibrate by script", _calibrate, model=SCRIPT),
)


@dataclass
class Result:
    """Counts of one stage; ``failures`` says what was wrong, and must be empty."""

    stage: str
    seconds: float
    points: int
    runs: dict[str, int] = field(default_factory=dict)
    slowest_interrupt: float = 0.0
    failures: list[str] = field(default_factory=list)


STARTS_THREADS = ("onnxruntime", "ray")
"""Modules that a child imports by itself."""


class Server:
    """Runs commands in forks of this process, which has everything imported: a run costs no start of Python.

    What that is it learns from the first run of each stage.
    """

    def __init__(self, log: Path) -> None:
        import scipy.optimize  # noqa: F401
        import torch
        import transformers  # noqa: F401

        import converters  # noqa: F401

        torch.set_num_threads(1)
        self._log = log

    def import_all(self, names: Iterable[str]) -> None:
        """Import modules that a child had. One that starts threads may not be among them: a fork has none."""
        n_threads = len(os.listdir("/proc/self/task"))
        for name in names:
            # of its own making, or an optional one
            if name not in sys.modules and not name.startswith(("__", *STARTS_THREADS)):
                with suppress(Exception):
                    importlib.import_module(name)
        if len(os.listdir("/proc/self/task")) != n_threads:
            raise SystemExit("an imported module has started a thread")

    def start(self, command: Sequence[str], points: Points | None = None, report: int = -1) -> int:
        """The process id of ``command``; ``report`` gets the number of points and the modules at the end."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 1
        # where this runs in the background of a script Ctrl-C is ignored, and stays so in children
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            for source, number in ((os.devnull, 1), (str(self._log), 2)):
                os.dup2(os.open(source, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            faulthandler.enable()
            sys.argv = ["mopeq-edge", *command]
            code = self._main(points)
            if report >= 0 and points is not None:
                with os.fdopen(report, "w") as file:
                    json.dump([points.count, list(sys.modules)], file)
        except BaseException as error:
            os.write(2, f"Traceback: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)

    def _main(self, points: Points | None) -> int:
        from mopeq_edge.cli import main

        try:
            if points is None:
                main()
            else:
                with counted(points):
                    main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0

    def run(self, command: Sequence[str], points: Points | None = None) -> tuple[int, str]:
        """(exit code, stderr)"""
        return self.end_of(self.start(command, points)), self.said()

    def end_of(self, child: int) -> int:
        """The exit code of ``child``; one that does not end says where it is, and is aborted."""
        handle = os.pidfd_open(child)
        try:
            if not select.select([handle], [], [], LONGEST_SECONDS)[0]:
                os.kill(child, signal.SIGABRT)
        finally:
            os.close(handle)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def count(self, command: Sequence[str], root: Path) -> tuple[int, int, list[str]]:
        """(exit code, points, modules) of an undisturbed run."""
        read, write = os.pipe()
        child = self.start(command, Points(root), write)
        os.close(write)
        with os.fdopen(read) as file:
            points, modules = json.loads(file.read() or "[0, []]")
        return self.end_of(child), points, modules

    def said(self) -> str:
        """stderr of the last run."""
        return self._log.read_text(errors="replace")


def state(folder: Path) -> dict[str, str]:
    """Hashes of all files below ``folder`` but caches; of a study's table without what differs from run to run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in UNCOMPARED:
            found[str(path.relative_to(folder))] = hashlib.sha256(_comparable(path)).hexdigest()
    return found


def _comparable(path: Path) -> bytes:
    if path.suffix != ".csv":
        return path.read_bytes()
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    return json.dumps(sorted([{k: v for k, v in row.items() if k != "seconds"} for row in rows], key=str)).encode()


class Trial:
    """One stage with its states before and after."""

    def __init__(self, server: Server, base: Path, stage: Stage, model: Path, text: Path) -> None:
        self.server, self.stage = server, stage
        self.run_folder, self._inputs = base / "run", (model, text)
        self.start = base / "states" / (stage.after or "nothing")
        self.command = stage.command(model, text, self.run_folder)
        self.inputs = self._input_state()
        self.reset()
        code, points, modules = server.count(self.command, self.run_folder)
        if code != 0:
            raise SystemExit(f"{stage.name} fails undisturbed: {server.said()}")
        server.import_all(modules)
        self.before, self.final = state(self.start), state(self.run_folder)
        shutil.copytree(self.run_folder, base / "states" / stage.name, dirs_exist_ok=True)
        missing = [name for name in stage.together if name not in self.final]
        if missing:
            raise SystemExit(f"{stage.name} leaves no {', '.join(missing)}")
        self.reset()
        began = time.monotonic()
        code, said = server.run(self.command)
        self.result = Result(stage.name, round(time.monotonic() - began, 2), points)
        if code != 0 or state(self.run_folder) != self.final:
            self.result.failures.append(f"undisturbed it gives other bytes the second time: {said[-200:]}")

    def reset(self) -> None:
        shutil.rmtree(self.run_folder, ignore_errors=True)
        if self.start.is_dir():
            shutil.copytree(self.start, self.run_folder)
        else:
            self.run_folder.mkdir(parents=True)

    def _input_state(self) -> dict[str, str]:
        model, text = self._inputs
        return {**state(model), "text": hashlib.sha256(text.read_bytes()).hexdigest()}

    def signalled(self, number: int, after: float, what: str) -> None:
        """``number`` is sent ``after`` seconds into the run."""
        self.reset()
        child = self.server.start(self.command)
        time.sleep(after)
        sent = time.monotonic()
        os.kill(child, number)
        code = self.server.end_of(child)
        took = time.monotonic() - sent
        if number == signal.SIGINT:
            self.result.slowest_interrupt = max(self.result.slowest_interrupt, round(took, 2))
            said = self.server.said()
            if code not in (0, 130) or "Traceback" in said or (code == 130 and not said.endswith("to go on\n")):
                self.result.failures.append(f"{what} {after:.2f}: exit {code}: {said[-200:]}")
            if took > 2:
                self.result.failures.append(f"{what} {after:.2f}: took {took:.2f} s to end")
        self._check(what, f"{after:.3f} s")

    def at_point(self, action: str, at: int) -> None:
        self.reset()
        code, said = self.server.run(self.command, Points(self.run_folder, action, at))
        if action == FULL and (code not in (0, 1) or "Traceback" in said):
            self.result.failures.append(f"{action} at {at}: exit {code}: {said[-200:]}")
        if action == FULL and [n for n in state(self.run_folder) if n.endswith((".tmp", ".lock"))]:
            self.result.failures.append(f"{action} at {at}: leaves a temporary file")
        self._check(action, str(at))

    def _check(self, what: str, where: str) -> None:
        self.result.runs[what] = self.result.runs.get(what, 0) + 1
        wrong = [f"{name} is neither old nor new" for name in self._partial()] + self._mixed()
        if self._input_state() != self.inputs:
            wrong.append("an input changed")
        code, said = self.server.run(self.command)
        if code != 0:
            wrong.append(f"the next run fails: {said[-200:]}")
        after = state(self.run_folder)
        different = sorted(name for name in after.keys() | self.final.keys() if after.get(name) != self.final.get(name))
        if different:
            wrong.append(f"the next run differs in {', '.join(different)}")
        self.result.failures += [f"{what} at {where}: {text}" for text in wrong]

    def _partial(self) -> list[str]:
        found = state(self.run_folder)
        odd = [n for n in found if n in self.final and found[n] not in (self.before.get(n), self.final[n])]
        return [name for name in odd if not _whole(self.run_folder / name)]

    def _mixed(self) -> list[str]:
        found, names = state(self.run_folder), self.stage.together
        if not names or names[0] not in found:
            return []
        kinds = [kind for kind in (self.before, self.final) if found[names[0]] == kind.get(names[0])]
        fits = any(all(found.get(name) == kind.get(name) for name in names) for kind in kinds)
        return [] if fits else [f"{names[0]} is there with others than its own"]


def _whole(path: Path) -> bool:
    """Of files that change as a stage goes on: records and tables that can be read."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".csv"
            assert all(None not in row.values() for row in csv.DictReader(path.open()))
    except (ValueError, AssertionError):
        return False
    return True


def make_model(kind: str, base: Path) -> None:
    """One of the random models, in the folder of its name."""
    from tests.builders import build_olmoe
    from tests.converters.unknown_families import build_lfm2_moe
    from tools.vision_language_checkpoints import Options, write_checkpoint
    from tools.vision_language_configs import TINY

    if kind == OLMOE:
        build_olmoe(base / kind)
    elif kind == SCRIPT:
        build_lfm2_moe(base / kind, "bfloat16")
    else:
        write_checkpoint(base / kind, Options(TINY, shrink=True))


def _needed(names: Sequence[str]) -> set[str]:
    by_name = {stage.name: stage for stage in STAGES}
    needed = set(names)
    for name in names:
        while (after := by_name[name].after) is not None:
            needed.add(after)
            name = after
    return needed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", help="names, separated by semicolons (default: all)")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--points", type=int, default=12, help="of each kind and stage; 0 for none")
    parser.add_argument("--interrupts", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    chosen = [name.strip() for name in given.stages.split(";")] if given.stages else [stage.name for stage in STAGES]
    base = given.work_dir.absolute()
    base.mkdir(parents=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    stages = [stage for stage in STAGES if stage.name in _needed(chosen)]
    text = _make_inputs(base, {stage.model for stage in stages})
    server, draw, results = Server(base / "stderr"), random.Random(given.seed), []
    for stage in stages:
        trial = Trial(server, base, stage, base / stage.model, text)
        if stage.name not in chosen:
            continue
        span = 1.05 * trial.result.seconds
        for _ in range(given.kills):
            trial.signalled(signal.SIGKILL, draw.uniform(0, span), "killed")
        for action in (KILL, TORN, FULL) if given.points else ():
            n = trial.result.points
            for at in sorted(draw.sample(range(1, n + 1), min(n, given.points))):
                trial.at_point(action, at)
        for _ in range(given.interrupts):
            # the first moments are Python's own, before the command line has begun
            trial.signalled(signal.SIGINT, draw.uniform(0.05, span), "Ctrl-C")
        results.append(trial.result)
        print(_row(trial.result), flush=True)
        for failure in trial.result.failures:
            print(f"  FAILED {failure}", flush=True)
        if given.json:
            given.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    return int(any(result.failures for result in results))


def _row(result: Result) -> str:
    runs: dict[str, Any] = {key: result.runs.get(key, 0) for key in ("killed", KILL, TORN, FULL, "Ctrl-C")}
    cells = [
        result.stage,
        result.seconds,
        result.points,
        *runs.values(),
        result.slowest_interrupt,
        len(result.failures),
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _make_inputs(base: Path, kinds: Iterable[str]) -> Path:
    """The models, each in a fork: threads of torch in this process would not survive into the stages. The text."""
    from tests.builders import EXAMPLE_TEXT

    for kind in sorted(kinds):
        if in_child(lambda kind=kind: make_model(kind, base)) != 0:  # type: ignore[misc]
            raise SystemExit(f"the model '{kind}' could not be made")
    text = base / "text.txt"
    text.write_text(EXAMPLE_TEXT.read_text()[:30_000])
    return text


if __name__ == "__main__":
    sys.exit(main())
