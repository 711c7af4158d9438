"""What sees pictures of a checkpoint that llama.cpp sees with: its ``mmproj`` file, by llama.cpp's own script.

The same guarded child process as the text side's (:mod:`converters.by_script`) writes it. The file carries hashes of
its tensors and what it was made from, as a GGUF of ours does.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from converters.by_script import SCRIPT, run_job
from converters.script_child import Job
from mopeq_edge.atomic import atomic_path
from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.file_hashes import unknown_hashes
from mopeq_edge.gguf_file import read_header
from mopeq_edge.runtime.locate import require_runtime
from mopeq_edge.seal import seal_file
from mopeq_edge.vision.mmproj import MADE_FROM_KEY, TYPES, is_mmproj

SETTINGS = ("vision_config", "audio_config", "whisper_config", "thinker_config", "vision_encoder")
"""One of these has the settings of what sees or hears."""

_TABLE = "MMPROJ_MODEL_MAP"
_WITHOUT = "--text-only leaves out what sees pictures"


def has_mmproj(config: Mapping[str, Any]) -> bool:
    """Whether the script of the installed llama.cpp makes an mmproj of a checkpoint with this ``config.json``."""
    if not any(isinstance(config.get(name), Mapping) for name in SETTINGS):
        return False
    vision = config.get("vision_config")
    named = [vision.get("architectures")] if isinstance(vision, Mapping) else []
    named.append(config.get("architectures"))
    # as the script: those of the part that sees come first
    found = next((names[0] for names in named if isinstance(names, list) and names), None)
    return found in known_architectures(require_runtime().convert)


def known_architectures(folder: Path) -> frozenset[str]:
    """Those that the script in ``folder`` knows, from its table; nothing of it is run."""
    path = folder / "conversion" / "__init__.py"
    try:
        module = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read ({error}); run: mopeq-edge runtime install --force") from None
    for node in module.body:
        targets: Sequence[ast.expr] = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == _TABLE for target in targets):
            value = getattr(node, "value", None)
            if isinstance(value, ast.Dict):
                return frozenset(str(key.value) for key in value.keys if isinstance(key, ast.Constant))
    raise FormatError(f"{path}: has no table {_TABLE}, as the script of this llama.cpp has; install it again")


def mmproj_bytes(directory: Path, kind: str) -> int:
    """Exactly the bytes of the file that :func:`write_mmproj` writes. Raises what that would raise."""
    with TemporaryDirectory(prefix="mopeq-edge-") as folder:
        path = Path(folder) / "mmproj.gguf"
        _run(directory, path, kind, "0" * 64, header_only=True)
        return path.stat().st_size


def write_mmproj(directory: Path, output: Path, kind: str, made_from: str) -> int:
    """Write the mmproj of ``directory`` with matrices of ``kind``, whole or not at all. Returns its bytes.

    ``made_from`` are 64 hex digits. Raises :class:`SourceError` with the script's last error if it fails.
    """
    with atomic_path(output) as temporary:
        _run(directory, temporary, kind, made_from, header_only=False)
        seal_file(temporary)
    return output.stat().st_size


def _run(directory: Path, output: Path, kind: str, made_from: str, *, header_only: bool) -> None:
    kvs: dict[str, str | list[str]] = {MADE_FROM_KEY: made_from}
    kvs |= {key: kv.value for key, kv in unknown_hashes(1).items()}
    model, out = str(directory.absolute()), str(output.absolute())
    run_job(Job(model, out, header_only=header_only, outtype=TYPES[kind], mmproj=kvs), directory, _WITHOUT)
    header = read_header(output)
    if not is_mmproj(header) or not header.tensors:
        raise SourceError(f"{directory}: llama.cpp's {SCRIPT} found nothing in it that sees pictures; {_WITHOUT}")
