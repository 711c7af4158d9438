"""Completion completes, in click and in a real bash, and loads neither torch nor transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from mopeq_edge.cli import COMMANDS, cli
from mopeq_edge.cli.completion import PROGRAM, VARIABLE

ROOT = Path(__file__).parent.parent.parent


def complete(args: list[str], incomplete: str) -> list[str]:
    return [item.value for item in ShellComplete(cli, {}, PROGRAM, VARIABLE).get_completions(args, incomplete)]


@pytest.mark.parametrize(
    ("args", "incomplete", "expected"),
    [
        ([], "con", ["convert"]),
        ([], "co", ["convert", "completion"]),
        ([], "none", []),
        ([], "", list(COMMANDS)),
        ([], "--ver", ["--version"]),
        (["plan"], "--la", ["--layout"]),
        (["plan", "--layout"], "", ["stock", "per-expert"]),
        (["runtime"], "in", ["info", "install"]),
        (["completion"], "z", ["zsh"]),
    ],
)
def test_completions(args: list[str], incomplete: str, expected: list[str]) -> None:
    assert complete(args, incomplete) == expected


def test_completion_loads_no_framework() -> None:
    """In a process of its own."""
    code = (
        "import sys; from click.shell_completion import ShellComplete; from mopeq_edge.cli import COMMANDS, cli; "
        "c = ShellComplete(cli, {}, 'mopeq-edge', '_MOPEQ_EDGE_COMPLETE'); assert c.get_completions([], ''); "
        "assert not [name for name in sys.modules if name.startswith('mopeq_edge.cli.')]; "
        "assert all(c.get_completions([name], '--h') for name in COMMANDS); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed(shell: str) -> None:
    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0
    assert f"{VARIABLE}={shell}_complete" in done.stdout
    assert CliRunner().invoke(cli, ["completion", "csh"]).exit_code == 2


def test_bash_completes(tmp_path: Path) -> None:
    """The script in a bash, whose function asks the program as a press of Tab would."""
    program = tmp_path / PROGRAM
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom mopeq_edge.cli import main\nmain()\n"
    )
    program.chmod(0o755)
    script = (
        'eval "$(mopeq-edge completion bash)"; COMP_WORDS=(mopeq-edge plan --la); COMP_CWORD=2; '
        "_mopeq_edge_completion mopeq-edge; echo ${COMPREPLY[@]}"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "--layout\n"
