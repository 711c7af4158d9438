"""Train a tiny OLMoE on a text, to study models of other shapes and other routing than the bundled one.

Minutes on two cores. ``--balance`` is the weight of the load-balancing loss: with less of it the router prefers fewer
experts, so experts differ more. The result is a Hugging Face directory with the bundled model's tokenizer.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import OlmoeConfig, OlmoeForCausalLM

from mopeq_edge.cli.console import console_progress, print_json

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-olmoe"
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""


def make_model(layers: int, experts: int, used: int, hidden: int, ff: int, window: int, balance: float) -> Any:
    """A fresh OLMoE in float32; the vocabulary is the bundled tokenizer's."""
    vocabulary = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).get_vocab_size()
    config = OlmoeConfig(
        **{"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": ff, "num_hidden_layers": layers},
        **{"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64},
        **{"max_position_embeddings": 4 * window, "num_experts": experts, "num_experts_per_tok": used},
        **{"router_aux_loss_coef": balance, "output_router_logits": True, "rms_norm_eps": 1e-5},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False},
    )
    config.architectures = ["OlmoeForCausalLM"]
    return OlmoeForCausalLM(config)


def train(model: Any, tokens: torch.Tensor, *, steps: int, batch: int, window: int, rate: float, seed: int) -> float:
    """AdamW with a cosine schedule on random windows. Returns the mean loss (nats) of the last tenth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    with console_progress() as progress, progress.step("train", steps) as step:
        for number in range(steps):
            warm = min(1.0, (number + 1) / (WARM_UP * steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * number / steps)))
            starts = torch.randint(len(tokens) - window, (batch,), generator=generator)
            windows = torch.stack([tokens[start : start + window] for start in starts])
            loss = model(windows, labels=windows).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            step.advance()
    return float(np.mean(losses[-max(1, steps // 10) :]))


@torch.no_grad()
def held_out_loss(model: Any, tokens: torch.Tensor, window: int, n_windows: int) -> float:
    """Mean cross-entropy in nats per token, without the balancing loss."""
    model.config.output_router_logits = False
    parts = [tokens[w * window : (w + 1) * window].unsqueeze(0) for w in range(n_windows)]
    return float(np.mean([float(model(part, labels=part, output_router_logits=False).loss) for part in parts]))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", default=3, show_default=True, help="Blocks.")
@click.option("--experts", default=64, show_default=True, help="Experts of a block.")
@click.option("--used", default=8, show_default=True, help="Experts of a token.")
@click.option("--hidden", default=256, show_default=True, help="Hidden size.")
@click.option("--ff", default=256, show_default=True, help="Hidden size of an expert.")
@click.option("--balance", default=0.01, show_default=True, help="Weight of the load-balancing loss.")
@click.option("--steps", default=600, show_default=True, help="Steps of training.")
@click.option("--batch", default=8, show_default=True, help="Windows of a step.")
@click.option("--window", default=256, show_default=True, help="Tokens of a window.")
@click.option("--rate", default=2e-3, show_default=True, help="Highest learning rate.")
@click.option("--seed", default=0, show_default=True, help="Of weights and windows.")
@click.option("--threads", default=2, show_default=True, help="Threads of torch.")
def main(
    out: Path,
    layers: int,
    experts: int,
    used: int,
    hidden: int,
    ff: int,
    balance: float,
    steps: int,
    batch: int,
    window: int,
    rate: float,
    seed: int,
    threads: int,
) -> None:
    """Train a model into the directory OUT on the bundled calibration text; evaluation.txt stays held out."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    texts = [EXAMPLE / name for name in ("calibration.txt", "evaluation.txt")]
    train_ids, held_ids = (torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8")).ids) for path in texts)
    model = make_model(layers, experts, used, hidden, ff, window, balance)
    start = time.perf_counter()
    loss = train(model, train_ids, steps=steps, batch=batch, window=window, rate=rate, seed=seed)
    seconds = time.perf_counter() - start
    held = held_out_loss(model.eval(), held_ids, window, n_windows=40)
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "calibration.txt", "evaluation.txt"):
        shutil.copy(EXAMPLE / name, out / name)
    numbers = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": steps * batch * window,
        "seconds": round(seconds, 1),
        "train_loss_nats": round(loss, 3),
        "held_out_loss_nats": round(held, 3),
    }
    (out / "training.json").write_text(json.dumps({**numbers, "balance": balance, "seed": seed}, indent=2) + "\n")
    print_json(numbers)


if __name__ == "__main__":
    main()
