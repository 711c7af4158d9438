"""The card: metadata for the Hub, then tables and commands as Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mopeq_edge.card.files import CardFile
from mopeq_edge.card.metadata import Origin
from mopeq_edge.card.text import markdown, yaml_lines
from mopeq_edge.errors import MopeqError
from mopeq_edge.plan.artifact import PER_EXPERT
from mopeq_edge.units import GB, GIB


@dataclass(frozen=True)
class Card:
    """``files`` of one model, and what it comes from."""

    files: tuple[CardFile, ...]
    origin: Origin

    @property
    def tags(self) -> tuple[str, ...]:
        has = {
            "gguf": True,
            "moe": any(file.n_expert for file in self.files),
            "quantized": True,
            "imatrix": any(file.imatrix for file in self.files),
            "mopeq-edge": any(file.version for file in self.files),
            "per-expert": any(file.layout == PER_EXPERT for file in self.files),
        }
        return tuple(tag for tag, is_so in has.items() if is_so)

    def notes(self) -> list[str]:
        """What is left out because nothing says it."""
        lacks = []
        if not self.origin.license:
            lacks.append("no licence: neither key-values nor a source's README say it; left out, add the model's own")
        if not self.origin.base_model:
            lacks.append("no base model: left out; give --base-model ORG/NAME")
        lacks += [
            f"{file.name}: nothing measured: no validation.json of it; left out"
            for file in self.files
            if not file.measured
        ]
        return lacks

    def as_dict(self) -> dict[str, Any]:
        return {"files": [f.as_dict() for f in self.files], "origin": asdict(self.origin), "tags": list(self.tags)}

    def text(self) -> str:
        """The whole README.md."""
        parts = [self._metadata(), f"# {markdown(self.files[0].title)} GGUF", self._table(), *self._run()]
        return "\n\n".join([*parts, *self._made(), self._checksums()]) + "\n"

    def _metadata(self) -> str:
        origin = self.origin
        lines = ["---", *yaml_lines("base_model", origin.base_model)]
        lines += yaml_lines("base_model_relation", "quantized" if origin.base_model else "")
        lines += yaml_lines("license", origin.license[0] if len(origin.license) == 1 else origin.license)
        lines += yaml_lines("license_name", origin.license_name) + yaml_lines("license_link", origin.license_link)
        lines += yaml_lines("library_name", "gguf") + yaml_lines("pipeline_tag", self._task)
        lines += yaml_lines("language", origin.language) + yaml_lines("tags", self.tags)
        return "\n".join([*lines, "---"])

    @property
    def _task(self) -> str:
        return "image-text-to-text" if any(file.beside for file in self.files) else "text-generation"

    def _table(self) -> str:
        measured = any(file.measured for file in self.files)
        head = ["file", "layout", "bytes", "GB", "GiB", "bpw", "experts, bpw"]
        head += ["mean KLD, nats", "99.9 % KLD, nats", "same top token"] if measured else []
        lines = [_row(head), "|" + "---|" * len(head)]
        for file in self.files:
            n = file.file_bytes
            experts = "" if file.expert_bpw is None else f"{file.expert_bpw:.3f}"
            row = [
                markdown(file.name),
                file.layout,
                f"{n:,}",
                _short(n / GB),
                _short(n / GIB),
                f"{file.bpw:.3f}",
                experts,
            ]
            m = file.measured
            if measured:
                row += ["", "", ""] if m is None else [f"{m.kld_mean:.5f}", f"{m.kld_p99_9:.4f}", f"{m.same_top:.4f}"]
            lines.append(_row(row))
        text = "GB is 1e9 bytes, GiB 2^30; bpw are bits per weight of the tensor data."
        if measured:
            text += " KLD and same top token: against the source's next token, in llama.cpp on held-out text."
        return "\n".join(lines) + f"\n\n{text}"

    def _run(self) -> list[str]:
        parts = ["## How to run"]
        stock = [file for file in self.files if file.layout != PER_EXPERT]
        grouped = [file for file in self.files if file.layout == PER_EXPERT]
        if any(len(file.sha256) > 1 + len(file.beside) for file in self.files):
            parts.append("Of a model in several files give the first; the others belong in the same directory.")
        if stock:
            name = shlex.quote(stock[0].name)
            parts.append(f"In any llama.cpp that knows {markdown(stock[0].architecture)}:")
            parts.append(f"```\nllama-cli -m {name} -p Hello\nllama-server -m {name} --port 8080\n```")
        eyes = next((file for file in self.files if file.beside), None)
        if eyes is not None:
            sizes = ", ".join(f"{markdown(name)} ({n:,} bytes)" for name, n in eyes.beside.items())
            parts.append(f"With pictures, from {sizes} in the same directory:")
            parts.append(f"```\nmopeq-edge run {shlex.quote(eyes.name)} --image photo.jpg -p 'What is this?'\n```")
        if grouped:
            names = ", ".join(markdown(file.name) for file in grouped)
            name = shlex.quote(grouped[0].name)
            parts.append(
                f"**Stock llama.cpp, Ollama and LM Studio do not load {names}**: the experts of a layer have "
                "different types. It runs in the llama.cpp that mopeq-edge builds:"
            )
            parts.append(
                f"```\nmopeq-edge runtime install\nmopeq-edge run {name} -p Hello\n"
                f"mopeq-edge serve {name} --port 8080\n```"
            )
        return parts

    def _made(self) -> list[str]:
        parts = ["## How it was made"]
        for file in self.files:
            facts = {**file.made, "imatrix of the text": file.imatrix_text, "mopeq-edge": file.version}
            facts["plan (SHA-256)"] = file.plan_sha256
            lines = [f"- {name}: {markdown(value)}" for name, value in facts.items() if value]
            for role, counts in file.types_by_role.items():
                mix = ", ".join(f"{kind} ({n})" for kind, n in counts.items())
                lines.append(f"- types of {role.replace('_', ' ')} tensors: {markdown(mix)}")
            parts += [f"### {markdown(file.name)}", "\n".join(lines)]
        return parts

    def _checksums(self) -> str:
        sums = [f"{value}  {name}" for file in self.files for name, value in file.sha256.items()]
        return "\n".join(["## Checksums\n", "SHA-256, as `sha256sum -c` reads them:\n", "```", *sums, "```"])


def make_card(files: Sequence[CardFile], source: Origin, base_model: str | None) -> Card:
    """One card for ``files``; what they do not say comes from ``source``.

    Raises :class:`MopeqError` for files that cannot be of one model.
    """
    first = files[0]
    for file in files[1:]:
        for what in ("architecture", "n_expert"):
            if getattr(file, what) != getattr(first, what):
                raise MopeqError(
                    f"{file.name}: {what} is {getattr(file, what)}, expected {getattr(first, what)} as in "
                    f"{first.name}; a card is for files of one model"
                )
        if file.origin.license and first.origin.license and file.origin.license != first.origin.license:
            raise MopeqError(f"{file.name}: has another licence than {first.name}; a card is for files of one model")
    origin = Origin()
    for known in (*(file.origin for file in files), source):
        origin = origin.filled_from(known)
    return Card(tuple(files), replace(origin, base_model=(base_model,)) if base_model is not None else origin)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _short(number: float) -> str:
    return f"{number:.3f}" if number >= 1 else f"{number:.4g}"
