"""Run a llama.cpp tool of the installed runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from mopeq_edge.errors import MopeqError, OutputError
from mopeq_edge.runtime.locate import Runtime, tool
from mopeq_edge.runtime.process import describe_exit, last_words, run_lines


def run_tool(
    name: str,
    args: Sequence[str | Path],
    *,
    log: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    cwd: Path | None = None,
    runtime: Runtime | None = None,
) -> str:
    """Run e.g. "llama-quantize" with ``args`` to its end and return all that it wrote.

    stdout and stderr come together. Each line goes to ``on_line`` (without its end) and to the
    file ``log`` as soon as the tool has ended the line. ``runtime`` defaults to the stock build.

    Raises RuntimeMissingError if the tool is missing or cannot start, OutputError if ``log`` cannot be written, and
    MopeqError, with the tool's last line, if the tool fails.
    """
    program = tool(name, runtime)
    lines: list[str] = []
    with ExitStack() as stack:
        try:
            file = stack.enter_context(log.open("w", encoding="utf-8")) if log is not None else None
        except OSError as error:
            raise OutputError(f"{log}: the log of {name} cannot be written: {error.strerror}") from error

        def take(line: str) -> None:
            lines.append(line)
            if file is not None:
                print(line, file=file, flush=True)
            if on_line is not None:
                on_line(line)

        code = run_lines([program, *args], take, cwd=cwd)
    if code != 0:
        where = f"; see {log}" if log is not None else ""
        raise MopeqError(f"{name} {describe_exit(code)}: {last_words(lines)}{where}")
    return "".join(f"{line}\n" for line in lines)
