"""The command line as tests call it."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.errors import MopeqError


def run_json(*args: object) -> dict[str, Any]:
    """What ``mopeq-edge ARGS`` prints as JSON. Raises the :class:`MopeqError` that it would end with."""
    done = CliRunner().invoke(cli, [str(arg) for arg in args])
    if isinstance(done.exception, MopeqError):
        raise done.exception
    assert done.exception is None, done.exception
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found
