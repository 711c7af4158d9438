"""Run as a program: does the Python binding fit the llama.cpp of $LLAMA_CPP_LIB_PATH? Exit code 0, or why not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mopeq_edge.errors import MopeqError

DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "type_k": 1, "type_v": 1}
"""What llama.cpp fills in: fields from the begin to the end of the structure. A shifted one reads otherwise."""


def reason(request: dict[str, Any]) -> str | None:
    """Why the binding cannot be used, or None."""
    from mopeq_edge.binding import LlamaModel
    from mopeq_edge.device_report.build import same_version
    from mopeq_edge.runtime.locate import import_llama_cpp

    try:
        module = import_llama_cpp()
        found = module.llama_version().decode()
    except (MopeqError, AttributeError) as error:
        return f"llama-cpp-python does not load this llama.cpp: {' '.join(str(error).split())}"
    if not same_version(found, request["expected"]):
        expected = request["expected"] or "unknown"
        return f"this llama.cpp is {found}, and llama-cpp-python {module.__version__} is made for {expected}"
    wrong = wrong_defaults(module)
    if wrong:
        return f"the structures of llama-cpp-python {module.__version__} are not those of this {found}: {wrong}"
    try:
        with LlamaModel(Path(request["model"]), n_ctx=32, n_batch=8, n_gpu_layers=request["n_gpu_layers"]) as model:
            model.logits([0])
    except MopeqError:
        # the file's own fault, which a test finds and names
        return None
    return None


def wrong_defaults(module: ModuleType) -> str:
    """The defaults that do not read as they should, or an empty string."""
    params = module.llama_context_default_params()
    found = {name: getattr(params, name, None) for name in DEFAULTS}
    return ", ".join(f"{name} is {found[name]}" for name, value in DEFAULTS.items() if found[name] != value)


def main() -> None:
    """The request is JSON on stdin."""
    why = reason(json.load(sys.stdin))
    if why is not None:
        print(f"reason: {why}")
        sys.exit(1)


if __name__ == "__main__":
    main()
