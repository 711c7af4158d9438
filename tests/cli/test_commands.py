"""Every command has help with an example, its JSON parses, and inspect's numbers are right."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from mopeq_edge import __version__
from mopeq_edge.cli import COMMANDS, cli
from mopeq_edge.errors import PlanError
from mopeq_edge.gguf_file import read_header
from mopeq_edge.gguf_layout import layout
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.output_kvs import IMATRIX_NAME, Provenance, output_kvs
from mopeq_edge.source.huggingface import HuggingFaceSource

WIDTH = 80


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def inspect(model: Path, *args: object) -> dict[str, Any]:
    pre = ("--pre", "gpt-2") if model.is_dir() else ()
    done = invoke("inspect", model, "--json", *pre, *args)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_table_of_commands_is_what_there_is() -> None:
    context = click.Context(cli)
    assert cli.list_commands(context) == list(COMMANDS)
    shown = invoke("--help").stdout
    for name, (_, _, line) in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert re.search(rf"^ +{name} +{re.escape(line)}$", shown, re.MULTILINE)
    assert cli.get_command(context, "none") is None
    assert invoke("none").exit_code == 2
    assert invoke("--version").stdout == f"mopeq-edge, version {__version__}\n"


def command_of(words: Sequence[str]) -> click.Command:
    command: click.Command = cli
    for word in words:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None
        command = found
    return command


def every_command() -> list[str]:
    """Each command that runs, with the words that lead to it."""
    names = []
    for name in COMMANDS:
        command = command_of([name])
        names += [f"{name} {child}" for child in command.commands] if isinstance(command, click.Group) else [name]
    return names


@pytest.mark.parametrize("name", [*every_command(), "runtime"])
def test_help_fits_the_terminal_and_describes_every_option(name: str) -> None:
    for flag in ("--help", "-h"):
        done = invoke(*name.split(), flag)
        assert done.exit_code == 0
    assert max(len(line) for line in done.stdout.splitlines()) <= WIDTH
    command = command_of(name.split())
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name}: {option.name}"


@pytest.mark.parametrize("name", every_command())
def test_help_has_an_example_whose_options_exist(name: str) -> None:
    shown = invoke(*name.split(), "--help").stdout
    example = re.search(rf"^  Example:\n    mopeq-edge {name}(.*)$", shown, re.MULTILINE)
    assert example is not None
    # parses: no unknown option, no missing argument
    # click keeps the help option that a command is first asked with
    root = click.Context(cli, **cli.context_settings)
    command_of(name.split()).make_context(name, example[1].split(), root, resilient_parsing=False)


def test_inspect_of_the_bundled_model_by_hand(tiny_model: Path) -> None:
    found = inspect(tiny_model)
    hidden, ff, vocabulary, layers, experts = 256, 256, 4096, 4, 16
    assert (found["architecture"], found["kind"]) == ("olmoe", "huggingface")
    assert (found["n_layer"], found["n_expert"], found["n_expert_used"]) == (layers, experts, 4)
    weights = {
        "expert": layers * experts * 3 * hidden * ff,
        "attention": layers * 4 * hidden * hidden,
        "embedding": vocabulary * hidden,
        "output": vocabulary * hidden,
        "router": layers * hidden * experts,
        # before attention, before the experts, of queries and of keys; and the last one
        "norm": layers * 4 * hidden + hidden,
    }
    parts = found["by_role"]
    assert {role: part["n_weights"] for role, part in parts.items()} == weights
    assert {role: part["n_tensors"] for role, part in parts.items()} == {
        **{"expert": 3 * layers, "attention": 4 * layers, "embedding": 1, "output": 1},
        **{"router": layers, "norm": 4 * layers + 1},
    }
    for role, part in parts.items():
        kind, size = ("F32", 4) if role in ("router", "norm") else ("BF16", 2)
        assert (part["types"], part["nbytes"]) == ([kind], size * weights[role])
    total = sum(weights.values())
    data = sum(part["nbytes"] for part in parts.values())
    assert (found["n_weights"], found["tensor_bytes"]) == (total, data)
    assert found["bpw"] == pytest.approx(8 * data / total)


def test_inspect_s_smallest_and_largest_plan_by_hand(tiny_model: Path, tiny_source: HuggingFaceSource) -> None:
    """Every row of the model is one block of 256."""
    header = len(
        layout(
            output_kvs(tiny_source.kvs, 0, Imatrix({}, ("calibration.txt",), 0, 0), IMATRIX_NAME, Provenance()),
            [(t.name, t.shape, t.type) for t in tiny_source.tensors],
        ).header
    )
    expert_blocks, other_blocks, f32_weights = 4 * 16 * 3 * 256, 4 * 4 * 256 + 2 * 4096, 4 * 256 * 16 + 17 * 256
    fixed = header + 4 * f32_weights
    everything = inspect(tiny_model)
    # IQ2_XXS has 66 bytes a block, IQ4_XS (the smallest of 4 bits or more) 136, BF16 512
    assert everything["smallest_bytes"] == fixed + 66 * expert_blocks + 136 * other_blocks
    assert everything["largest_bytes"] == fixed + 512 * (expert_blocks + other_blocks)
    # Q2_K 84, Q4_K 144
    assert inspect(tiny_model, "--types", "k")["smallest_bytes"] == fixed + 84 * expert_blocks + 144 * other_blocks
    # Q6_K 210 for the output, Q3_K 110 for attention
    floors = ("--types", "k", "--floor", "output=Q6_K", "--floor", "attention=3.4")
    attention, embedding = 4 * 4 * 256, 4096
    expected = fixed + 84 * expert_blocks + 110 * attention + 144 * embedding + 210 * 4096
    assert inspect(tiny_model, *floors)["smallest_bytes"] == expected


def test_the_error_of_an_impossible_budget_states_what_inspect_shows(tiny_model: Path, tmp_path: Path) -> None:
    smallest = inspect(tiny_model)["smallest_bytes"]
    options = ("--pre", "gpt-2", "--work-dir", tmp_path / "work")
    gb = f"{(smallest - 1) / 1e9:.9f}"
    done = invoke("convert", tiny_model, tmp_path / "out.gguf", "--target-gb", gb, *options)
    assert isinstance(done.exception, PlanError)
    assert f"({smallest - 1} bytes): the smallest file these types and floors allow has {smallest} bytes" in str(
        done.exception
    )


def test_inspect_of_a_gguf(bf16_gguf: Path, tiny_model: Path) -> None:
    found, expected = inspect(bf16_gguf), inspect(tiny_model)
    assert found.pop("kind") == "gguf"
    assert expected.pop("kind") == "huggingface"
    assert found == expected
    assert found["n_weights"] == sum(t.n_weights for t in read_header(bf16_gguf).tensors)


def test_tables_stay_within_the_width(tiny_model: Path, bf16_gguf: Path) -> None:
    for args in ((tiny_model, "--pre", "gpt-2"), (bf16_gguf,)):
        done = invoke("inspect", *args)
        assert done.exit_code == 0, done.output
        assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= WIDTH
        for part in ("olmoe", "16, 4 used per token", "15,749,376", "smallest plan"):
            assert part in done.stdout
