"""A trained OLMoE with narrower experts: the neurons of least weight are left out, to study awkward widths.

A neuron's weight is the product of the lengths of its row in gate and up and of its column in down.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from mopeq_edge.atomic import atomic_directory
from mopeq_edge.errors import SourceError

KEPT = ("tokenizer.json", "tokenizer_config.json", "calibration.txt", "evaluation.txt")


def narrow(model: Path, out: Path, width: int) -> Path:
    """Write ``model``, one safetensors file with a tensor for each matrix, with experts ``width`` wide to ``out``."""
    config = json.loads((model / "config.json").read_text())
    if not 0 < width <= config["intermediate_size"]:
        raise SourceError(
            f"{model}: experts are {config['intermediate_size']} wide; give a width up to that, not {width}"
        )
    tensors = load_file(model / "model.safetensors")
    for name in [name.removesuffix("gate_proj.weight") for name in tensors if name.endswith("gate_proj.weight")]:
        gate, up, down = (f"{name}{which}_proj.weight" for which in ("gate", "up", "down"))
        weight = tensors[gate].float().norm(dim=1) * tensors[up].float().norm(dim=1) * tensors[down].float().norm(dim=0)
        kept = weight.argsort(descending=True, stable=True)[:width].sort().values
        tensors[gate], tensors[up] = tensors[gate][kept], tensors[up][kept]
        tensors[down] = tensors[down][:, kept].contiguous()
    with atomic_directory(out) as path:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({**config, "intermediate_size": width}, indent=2))
        for file in KEPT:
            if (model / file).is_file():
                shutil.copy(model / file, path / file)
    return out


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--width", type=int, default=224, show_default=True)
def main(model: Path, out: Path, width: int) -> None:
    """Write MODEL with narrower experts to OUT, a directory that does not exist yet."""
    torch.set_num_threads(1)
    click.echo(narrow(model, out, width))


if __name__ == "__main__":
    main()
