"""Who may import whom. Read from the source text, so that an import inside a function counts too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mopeq_edge", "converters", "runtime_tests", "tools")


def imports_of(path: Path, root: Path = ROOT) -> set[str]:
    """Full names of all modules that a file imports; for ``from a import b`` both ``a`` and ``a.b``."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join((*package[: len(package) - node.level + 1], node.module or "")) if node.level else node.module
            )
            base = (base or "").rstrip(".")
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found.update(arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
    return found


def sources() -> Iterator[tuple[str, set[str]]]:
    """(path from the root, top-level packages that it imports)."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), {name.partition(".")[0] for name in imports_of(path)}


def breaches(names: set[str], inside: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    """Files under ``inside`` that import one of ``names``, apart from those under ``allowed``."""
    return [
        f"{path} imports {', '.join(sorted(imported & names))}"
        for path, imported in sources()
        if imported & names and path.startswith(inside) and not path.startswith(allowed)
    ]


def test_the_product_does_not_need_its_own_checks() -> None:
    assert breaches({"runtime_tests", "tools", "tests"}, ("mopeq_edge/", "converters/")) == []


def test_the_core_does_not_know_the_converters() -> None:
    assert breaches({"converters"}, ("mopeq_edge/",), ("mopeq_edge/cli/", "mopeq_edge/pipeline")) == []


def test_frameworks_stay_where_models_run() -> None:
    inside = ("mopeq_edge/", "converters/", "runtime_tests/", "tools/")
    tools = (
        "dense_llama",
        "slice_dense",
        "slices",
        "tiny_models",
        "train_moe",
        "narrow_experts",
        "crash_test",
        "sight_model",
        "sight_batches",
        "sight_accuracy",
        "train_sight",
        "compare_sight",
        "vision_agreement",
        "vision_language_checkpoints",
        "fuzz/seeds",
    )
    models_run_in = ("mopeq_edge/calibrate/", "converters/", *(f"tools/{name}.py" for name in tools))
    pickles_are_read_in = "mopeq_edge/source/torch_file.py"
    assert breaches({"torch", "transformers"}, inside, (*models_run_in, pickles_are_read_in)) == []


def test_a_cluster_is_asked_for() -> None:
    """Ray is imported when ``--engine ray`` is given, fsspec for a URL."""
    inside = ("mopeq_edge/", "converters/", "runtime_tests/")
    assert breaches({"ray"}, inside, ("mopeq_edge/engine/ray.py", "mopeq_edge/engine/worker.py")) == []
    assert breaches({"fsspec"}, inside, ("mopeq_edge/source/remote.py",)) == []
    code = "import sys; import mopeq_edge.source.open, mopeq_edge.engine.ray, mopeq_edge.emit_parts; "
    code += "assert not {'ray', 'fsspec'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_checks_a_file_on_the_device_needs_no_framework() -> None:
    """By its own text, and in a process of its own by that of everything that it imports."""
    assert breaches({"torch", "transformers"}, ("converters/onnx_reference/",)) == []
    suite = [f"runtime_tests.{path.stem}" for path in sorted((ROOT / "runtime_tests").glob("*.py"))]
    for modules in (["converters.onnx_reference"], suite):
        code = f"import sys, {', '.join(modules)}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_pictures_on_the_device_need_no_framework_and_no_converter() -> None:
    inside = ("mopeq_edge/vision/", "mopeq_edge/pipeline_vision.py", "mopeq_edge/cli/image.py", "converters/vision/")
    assert breaches({"torch", "transformers"}, (*inside, "mopeq_edge/serving/", "mopeq_edge/cli/server.py")) == []
    # onnx is no framework: it reads a stranger's graph before onnxruntime does
    code = "import sys; import mopeq_edge.vision.answer, mopeq_edge.serving.listen; "
    code += "found = {'torch', 'transformers', 'converters'}"
    subprocess.run([sys.executable, "-c", f"{code}; assert not found & set(sys.modules)"], check=True, cwd=ROOT)
    code = "import sys; import converters.vision; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_opening_a_checkpoint_imports_no_torch(tiny_model: Path) -> None:
    """In a process of its own: torch is for files that only torch can read."""
    code = "import sys; from mopeq_edge.source.checkpoint import Checkpoint; from pathlib import Path; "
    code += f"assert Checkpoint(Path({str(tiny_model)!r})).names; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_something_was_looked_at() -> None:
    found = dict(sources())
    assert "numpy" in found["mopeq_edge/source/model.py"]
    assert "transformers" in found["converters/vocabulary.py"]  # inside a function


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import torch.nn as nn", "torch.nn"),
        ("def f():\n    from torch import nn", "torch"),
        ("from ..cli import main", "mopeq_edge.cli.main"),
        ("from . import solve", "mopeq_edge.plan.solve"),
        ("import importlib\nimportlib.import_module('torch')", "torch"),
    ],
)
def test_imports_are_seen(tmp_path: Path, text: str, name: str) -> None:
    path = tmp_path / "mopeq_edge" / "plan" / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert name in imports_of(path, tmp_path)
