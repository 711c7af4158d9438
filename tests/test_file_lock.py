"""One process at a time: who comes second is told, and a killed holder holds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mopeq_edge.errors import BusyError
from mopeq_edge.file_lock import held_alone

HOLD = """
import sys
from pathlib import Path
from mopeq_edge.file_lock import held_alone
with held_alone(Path(sys.argv[1]), "work"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(lock: Path) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    return child


def test_the_second_is_told_who_is_there(tmp_path: Path) -> None:
    lock = tmp_path / "new" / ".lock"
    with holder(lock) as child:
        with pytest.raises(BusyError) as caught, held_alone(lock, "olmoe.mopeq"):
            pass
        assert str(caught.value).startswith(f"olmoe.mopeq: another mopeq-edge (pid {child.pid}) works there; wait")
        assert "\n" not in str(caught.value)
        child.communicate()
    with held_alone(lock, "olmoe.mopeq"):
        assert lock.exists()
    # nothing came to be in the new folder
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with holder(lock) as child:
        child.kill()
    assert lock.exists()
    with held_alone(lock, "work"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_name_that_was_removed_is_no_lock(tmp_path: Path) -> None:
    """Whoever opened the file before its holder removed it must not hold a file that nobody else sees."""
    lock = tmp_path / ".lock"
    with held_alone(lock, "work"):
        lock.unlink()
        with held_alone(lock, "work"), pytest.raises(BusyError), held_alone(lock, "work"):
            pass
