"""Train a tiny MoE to imitate the bundled one, to study models of other shapes and other routing.

Minutes on two cores. The bundled model continues beginnings of ``calibration.txt``, and the new one learns to give its
probabilities on these texts (distillation). So a small text is enough, and neither ``calibration.txt`` nor
``evaluation.txt`` is learnt by heart, which would falsify calibration. ``--balance`` is the weight of the
load-balancing loss: with less of it, or below 0, the router prefers fewer experts, so experts differ more.
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
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, one_hot
from transformers import DynamicCache

from mopeq_edge.cli.console import console_progress, print_json
from mopeq_edge.progress import Progress
from tools.tiny_models import (
    ARCHITECTURES,
    EXAMPLE,
    OLMOE,
    Shape,
    load_tokenizer,
    logits_of,
    make_model,
    routers,
    save,
    start_from_bundled,
    teacher,
)

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
BEGINNING = 32
"""Tokens of ``calibration.txt`` that the bundled model continues."""
SAMPLED_AT_ONCE = 512


@torch.no_grad()
def continuations(model: Any, tokens: Tensor, count: int, window: int, seed: int, progress: Progress) -> Tensor:
    """Texts of ``model`` [count, window], drawn at temperature 1; each begins with tokens from a random place."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    with progress.step("texts", -(-count // SAMPLED_AT_ONCE) * (window - BEGINNING)) as step:
        for _ in range(-(-count // SAMPLED_AT_ONCE)):
            starts = torch.randint(len(tokens) - BEGINNING, (min(count, SAMPLED_AT_ONCE),), generator=generator)
            text = fed = torch.stack([tokens[s : s + BEGINNING] for s in starts])
            cache = DynamicCache(config=model.config)
            while text.shape[1] < window:
                p = model(fed, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1].softmax(dim=-1)
                fed = torch.multinomial(p, 1, generator=generator)
                text = torch.cat([text, fed], dim=1)
                step.advance()
            found.append(text)
    return torch.cat(found)[:count]


def balance_loss(logits: list[Tensor], used: int) -> Tensor:
    """Mean over layers of n_expert * sum_e f_e p_e, f the share of choices and p the mean probability; 1 is even."""
    losses = []
    for own in logits:
        p = own.softmax(dim=-1)
        f = one_hot(p.topk(used, dim=-1).indices, p.shape[-1]).sum(dim=1).float().mean(dim=0) / used
        losses.append(p.shape[-1] * (f * p.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def train(
    model: Any,
    guide: Any,
    texts: Tensor,
    *,
    used: int,
    balance: float,
    steps: int,
    batch: int,
    rate: float,
    progress: Progress,
) -> tuple[float, float]:
    """AdamW with a cosine schedule on ``texts`` [n, window] in turn. Returns the means over the last tenth of the
    steps of KL(guide || model) in nats per token and of the balancing loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    seen: list[Tensor] = []
    hooks = [r.register_forward_hook(lambda _m, _i, out: seen.append(out[0])) for r in routers(model)]
    losses: list[tuple[float, float]] = []
    with progress.step("train", steps) as step:
        for number in range(steps):
            warm = min(1.0, (number + 1) / (WARM_UP * steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * number / steps)))
            rows = torch.arange(number * batch, (number + 1) * batch) % len(texts)
            with torch.no_grad():
                wanted = log_softmax(logits_of(guide, texts[rows]), dim=-1).flatten(0, 1)
            seen.clear()
            given = log_softmax(logits_of(model, texts[rows]), dim=-1).flatten(0, 1)
            kl, even = kl_div(given, wanted, reduction="batchmean", log_target=True), balance_loss(seen, used)
            optimizer.zero_grad()
            (kl + balance * even).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append((kl.item(), even.item()))
            step.advance()
    for hook in hooks:
        hook.remove()
    last = np.mean(losses[-max(1, steps // 10) :], axis=0)
    return float(last[0]), float(last[1])


@torch.no_grad()
def held_out_loss(model: Any, tokens: Tensor, window: int, n_windows: int) -> float:
    """Mean cross-entropy in nats per token."""
    found = []
    for w in range(n_windows):
        part = tokens[w * window : (w + 1) * window]
        log_p = log_softmax(logits_of(model, part.unsqueeze(0))[0, :-1], dim=-1)
        found.append(-float(log_p.gather(1, part[1:, None]).mean()))
    return float(np.mean(found))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--texts",
    type=click.Path(path_type=Path),
    default="texts.npy",
    show_default=True,
    help="Texts of the bundled model; made if they are not there, and serve other trainings.",
)
@click.option("--n-texts", default=1024, show_default=True, help="Number of these texts.")
@click.option("--architecture", type=click.Choice(ARCHITECTURES), default=OLMOE, show_default=True)
@click.option("--layers", default=3, show_default=True, help="Blocks.")
@click.option("--experts", default=64, show_default=True, help="Experts of a block.")
@click.option("--used", default=8, show_default=True, help="Experts of a token.")
@click.option("--shared", default=1, show_default=True, help="Shared experts (deepseek).")
@click.option("--hidden", default=256, show_default=True, help="Hidden size.")
@click.option("--ff", default=256, show_default=True, help="Hidden size of an expert.")
@click.option("--balance", default=0.01, show_default=True, help="Weight of the load-balancing loss.")
@click.option("--noise", default=0.5, show_default=True, help="Noise on experts and routers over their size, at first.")
@click.option("--steps", default=600, show_default=True, help="Steps of training.")
@click.option("--batch", default=8, show_default=True, help="Windows of a step.")
@click.option("--window", default=256, show_default=True, help="Tokens of a window.")
@click.option("--rate", default=1e-3, show_default=True, help="Highest learning rate.")
@click.option("--seed", default=0, show_default=True, help="Of weights and texts.")
@click.option("--threads", default=2, show_default=True, help="Threads of torch.")
def main(out: Path, **given: Any) -> None:
    """Train a model into the directory OUT; evaluation.txt is never read but to state the loss."""
    seed, window, batch, steps = given["seed"], given["window"], given["batch"], given["steps"]
    torch.set_num_threads(given["threads"])
    shape = Shape(**{name: given[name] for name in Shape.__dataclass_fields__})
    tokenizer, guide = load_tokenizer(), teacher()
    texts = [EXAMPLE / name for name in ("calibration.txt", "evaluation.txt")]
    known, held = (torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8")).ids) for path in texts)
    start = time.perf_counter()
    with console_progress() as progress:
        if not given["texts"].exists():
            np.save(given["texts"], continuations(guide, known, given["n_texts"], window, seed, progress).numpy())
        sampled = torch.from_numpy(np.load(given["texts"]))
        torch.manual_seed(seed)
        model = make_model(shape)
        start_from_bundled(model, given["noise"], seed)
        rest = {name: given[name] for name in ("used", "balance", "steps", "batch", "rate")}
        kl, even = train(model, guide, sampled, **rest, progress=progress)
    seconds = time.perf_counter() - start
    losses = [held_out_loss(m, held, window, n_windows=40) for m in (model.eval(), guide)]
    out.mkdir(parents=True, exist_ok=True)
    save(model, shape, out)
    for name in ("tokenizer.json", "tokenizer_config.json", "calibration.txt", "evaluation.txt"):
        shutil.copy(EXAMPLE / name, out / name)
    numbers = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": steps * batch * window,
        "seconds": round(seconds, 1),
        "kl_to_bundled_nats": round(kl, 4),
        "balancing_loss": round(even, 3),
        "held_out_loss_nats": round(losses[0], 3),
        "held_out_loss_of_bundled_nats": round(losses[1], 3),
    }
    settings = {name: given[name] for name in ("balance", "noise", "steps", "rate", "seed")}
    (out / "training.json").write_text(json.dumps({**numbers, **settings}, indent=2) + "\n")
    print_json(numbers)


if __name__ == "__main__":
    main()
