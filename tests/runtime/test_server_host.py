"""A server that nobody asked to open to the network stays on this machine."""

from __future__ import annotations

import pytest

from mopeq_edge.runtime.server_host import host_arguments

LOCAL = ["--host", "127.0.0.1"]


def test_this_machine_alone_by_default() -> None:
    assert host_arguments(["--port", "8080", "--api-key", "k"], {}) == (LOCAL, None)
    assert host_arguments([], {"HOST": "0.0.0.0"}) == (LOCAL, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]", "/run/llama.sock"])
def test_a_local_host_is_no_matter(host: str) -> None:
    assert host_arguments(["--host", host], {}) == ([], None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "edge.local"])
def test_an_open_one_is_passed_with_a_line(host: str) -> None:
    added, warning = host_arguments(["--host", "127.0.0.1", "--host", host], {})
    assert added == []
    assert warning is not None
    assert warning.startswith(f"warning: --host {host}: other machines can reach the server, and without --api-key")
    assert "\n" not in warning
    assert host_arguments([], {"LLAMA_ARG_HOST": host}) == ([], warning)
    assert host_arguments(["--host", host, "--api-key", "k"], {})[1] == warning.split(", and")[0]
