"""What a machine checks before it works, without a cluster."""

from __future__ import annotations

import builtins
import socket
from typing import Any

import pytest

from mopeq_edge.engine import worker
from mopeq_edge.engine.ray import _task, connected
from mopeq_edge.errors import ClusterError, ExtraMissingError

OURS = (("mopeq-edge", "1"), ("Python", "3.11"), ("numpy", "2"), ("libggml", "abc"))


@pytest.mark.parametrize("at", range(4))
def test_other_versions_do_no_work(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Nothing is unpickled: what it would be made of may not be there."""
    monkeypatch.setattr(worker, "versions", lambda: OURS)
    other = tuple((what, "other" if number == at else version) for number, (what, version) in enumerate(OURS))
    kind, said, _ = worker.run_task(other, None, b"no pickle")
    assert kind == "ClusterError"
    what, version = OURS[at]
    assert said == f"has {what} {version}, expected other as here; install the same everywhere"


def test_a_machine_without_mopeq_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    own = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("mopeq_edge"):
            raise ModuleNotFoundError("No module named 'mopeq_edge'")
        return own(name, *rest)

    run = _task()
    monkeypatch.setattr(builtins, "__import__", without)
    _, kind, said, _ = run(OURS, None, b"")
    monkeypatch.undo()
    assert kind == "ClusterError"
    assert "cannot import mopeq-edge (No module named 'mopeq_edge'); install it there, as here" in said


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    own = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'")
        return own(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExtraMissingError, match=r"pip install 'mopeq-edge\[ray\]'"), connected(None, print):
        pass


def test_an_address_where_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(ClusterError, match=f"--address {address}: nothing answers there"),
            connected(address, print),
        ):
            pass


def test_rays_own_client_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"expected HOST:PORT or auto, found a URL"), connected("ray://x:1", print):
        pass
