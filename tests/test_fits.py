"""``--fits``: the file that is planned for a device's memory, against the prediction of the finished file."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.errors import NoRoomError
from mopeq_edge.gguf_file import read_header

from .builders import EXAMPLE_TEXT, build_olmoe
from .commands import run_json

pytestmark = pytest.mark.runtime

COMMON = ("--pre", "gpt-2", "--threads", 1, "--json")
SERVED = ("--ctx", 2048, "--cache-type", "q8_0", "--parallel", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_olmoe(tmp_path_factory.mktemp("model"), hidden=256, ff=256, n_expert=8, n_layer=3)


@pytest.fixture(scope="module")
def work(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("work")
    common = (*COMMON, "--work-dir", directory)
    run_json("calibrate", model, "--text", EXAMPLE_TEXT, "--chunks", 2, "--window", 64, "--no-fisher", *common)
    run_json("sensitivity", model, "--types", "k", "--sample-rows", 4, *common)
    return directory


def least(model: Path, work: Path) -> int:
    """Memory that the smallest file needs, of which a twentieth stays free."""
    with pytest.raises(NoRoomError) as error:
        run_json("plan", model, "--types", "k", "--target-gb", 1e-6, *COMMON, "--work-dir", work)
    smallest = error.value.smallest
    whole = run_json("memory", model, "--pre", "gpt-2", *SERVED, "--threads", 1, "--json")
    rest = whole["prediction"]["needed_bytes"] - whole["file_bytes"]
    return int((smallest + rest) / 0.95)


@pytest.mark.parametrize("form", ["stock", "per-expert"])
def test_the_file_needs_what_was_planned(model: Path, work: Path, tmp_path: Path, form: str) -> None:
    options = ("--types", "k", "--layout", form, "--work-dir", work, *COMMON)
    found = []
    for more in (800_000, 1_500_000, 2_500_000):
        memory, out = least(model, work) + more, tmp_path / f"{more}.gguf"
        plan = run_json("plan", model, "--fits", memory, *SERVED, *options)
        fits = plan["fits"]
        assert fits["memory_bytes"] == memory
        assert fits["headroom_bytes"] == memory - fits["needed_bytes"] >= 0.05 * memory - 1
        assert fits["weights_bytes"] == plan["file_bytes"]
        assert "--ctx-size 2048 --parallel 2 --cache-type-k q8_0" in " ".join(fits["llama_cpp_options"])
        run_json("emit", model, out, "--work-dir", work, *COMMON)
        # of the finished file, as the user would ask
        predicted = run_json("memory", out, *SERVED, "--threads", 1, "--json")["prediction"]
        assert predicted["needed_bytes"] == fits["needed_bytes"]
        assert out.stat().st_size == plan["file_bytes"] == read_header(out).file_size
        # the next larger choices are some ten kB away
        assert 0.95 * memory - fits["needed_bytes"] < 100_000
        found.append(plan)
    sizes, damages = [p["file_bytes"] for p in found], [p["damage"] for p in found]
    assert sizes == sorted(sizes)
    assert damages == sorted(damages, reverse=True)
    # more context, less file
    memory = least(model, work) + 2_500_000
    longer = run_json("plan", model, "--fits", memory, "--ctx", 2304, *SERVED[2:], *options)
    assert longer["file_bytes"] < found[-1]["file_bytes"]


def test_convert(model: Path, work: Path, tmp_path: Path) -> None:
    memory, out = least(model, work) + 1_500_000, tmp_path / "out.gguf"
    options = (
        "--types",
        "k",
        "--no-evaluate",
        "--sample-rows",
        4,
        "--text",
        EXAMPLE_TEXT,
        "--chunks",
        2,
        "--no-fisher",
    )
    result = run_json("convert", model, out, "--fits", memory, *SERVED, "--window", 64, *options, *COMMON)
    predicted = run_json("memory", out, *SERVED, "--threads", 1, "--json")["prediction"]
    assert predicted["needed_bytes"] == result["fits"]["needed_bytes"] <= 0.95 * memory


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--fits", "64MB"), "expected the context that it has to hold, found none; give --ctx N"),
        (("--fits", "a lot", "--ctx", 512), "memory 'a lot': expected a size such as 8GiB"),
        (("--fits", "64MB", "--ctx", 512, "--target-gb", 1), "--fits: takes the place of --target-gb"),
        (("--target-gb", 1, "--ctx", 512), "--ctx 512: belongs to --fits"),
        (("--target-gb", 1, "--cache-type", "q8_0"), "--cache-type q8_0: belongs to --fits"),
        (("--fits", "8MB", "--ctx", 512), "leave no room for weights"),
        (
            ("--fits", "33MB", "--ctx", 512),
            "all that --fits leaves for the file (",
        ),
        ((), "give exactly one of --target-gb"),
    ],
)
def test_bad_input(model: Path, work: Path, args: tuple[object, ...], message: str) -> None:
    before = (work / "plan.json").read_bytes() if (work / "plan.json").exists() else b""
    done = CliRunner().invoke(
        cli, [str(a) for a in ("plan", model, *args, "--types", "k", *COMMON, "--work-dir", work)]
    )
    assert done.exit_code == 1
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
    assert ((work / "plan.json").read_bytes() if (work / "plan.json").exists() else b"") == before
