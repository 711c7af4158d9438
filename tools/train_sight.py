"""Train a tiny DeepSeek-VL2 that sees: rendered shapes and digits, and questions about them.

``python -m tools.train_sight OUT`` made examples/tiny-sight, on two cores. Pictures are never repeated. Each has
several questions, and while it trains a second output says of each picture token which colour and thing it shows: the
tower learns from that within minutes, as released towers come trained. The same command on the same machine gives the
same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from mopeq_edge.cli.console import console_progress, print_json
from tools.sight_batches import NOT_ASKED, Batch, make_batch
from tools.sight_model import SIZES, Moe, Sight, save
from tools.sight_pictures import COLOURS, GRIDS, THINGS, ask, draw_scene
from tools.sight_text import AFTER, BEFORE, END, SPECIAL, make_tokenizer, prefix, save_tokenizer
from tools.train_moe import balance_loss

MUON = 10
"""Muon's learning rate over AdamW's."""
TOWER = 0.3
"""Learning rate of the tower's matrices over that of the text model's, once both learn."""
WARM_UP = 0.03
"""Share of the steps in which the learning rate rises."""
BALANCE = 0.01
"""Weight of the load-balancing loss."""
SHOWN = 0.3
"""Weight of what picture tokens show."""
GROUND = 0.2
"""Weight of picture tokens that show the ground, of which there are many, to those that show a thing."""
ASKED = 5
"""Questions about a picture, at most."""
SAMPLES, PICTURES = 200, 32
"""Pictures whose questions become a text, and that are written."""
HELD_OUT_FROM = 10**9
"""Seeds of pictures that training never draws."""


Heard = Callable[[float], None]


class Batches(Dataset[Batch]):
    """``steps`` batches of ``size`` pictures from the one of ``first`` on, each all cut alike."""

    def __init__(self, tokenizer: Tokenizer, first: int, steps: int, size: int, seed: int) -> None:
        self.text, self.first, self.steps, self.size, self.seed = tokenizer.to_str(), first, steps, size, seed
        self.tokenizer: Tokenizer | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> Batch:
        self.tokenizer = self.tokenizer or Tokenizer.from_str(self.text)
        number = self.first + i
        grid = Random(f"{self.seed} {number}").choice(GRIDS)
        start = 10**7 * self.seed + number * self.size
        return make_batch(self.tokenizer, grid, range(start, start + self.size), most=ASKED)


class Trained(nn.Module):
    """The model, and what says of its picture tokens which colour and thing each shows.

    By the embeddings of these words: what a picture token says is said as the words of a question say it, so that the
    text model finds the one by the other from the start.
    """

    def __init__(self, model: Sight, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        self.words = [[tokenizer.encode(f" {name}").ids[0] for name in names] for names in (COLOURS, THINGS)]
        self.ground = nn.Parameter(torch.zeros(SIZES.hidden))
        with torch.no_grad():
            # an answer is often a word that the text model found in the picture
            model.language.lm_head.weight.copy_(0.3 * model.language.model.embed_tokens.weight)

    def forward(self, batch: Batch, before: Tensor, tower_only: bool) -> tuple[Tensor | None, Tensor]:
        """Losses in nats: of the answers' tokens, and of what picture tokens show."""
        seen = self.model.see(batch.pixels.to(self.ground.dtype))
        shown = torch.stack([self._shown(seen, batch.covered[..., i], own) for i, own in enumerate(self.words)]).sum()
        if tower_only:
            return None, shown
        logits, labels = answer_logits(self.model, seen, batch, before)
        return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NOT_ASKED), shown

    def _shown(self, seen: Tensor, covered: Tensor, words: list[int]) -> Tensor:
        """Cross-entropy of the word, or the ground, that each picture token shows."""
        logits, weight = self._word_logits(seen, words), torch.tensor([GROUND] + [1.0] * len(words))
        return cross_entropy(logits.flatten(0, 2).float(), covered.flatten(), weight)

    def _word_logits(self, seen: Tensor, words: list[int]) -> Tensor:
        return seen @ torch.cat([self.ground[None], self.model.language.model.embed_tokens.weight[words]]).T

    @torch.no_grad()
    def shown_right(self, batch: Batch) -> float:
        """Share of the picture tokens that show a thing whose kind is the likeliest."""
        found = self._word_logits(self.model.see(batch.pixels), self.words[1]).argmax(dim=-1)
        wanted = batch.covered[..., 1]
        return float((found == wanted)[wanted > 0].float().mean())


def answer_logits(model: Sight, seen: Tensor, batch: Batch, before: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, m, n_vocab] wherever a token of an answer follows, and these tokens [n, m], :data:`NOT_ASKED` where
    a picture has fewer. ``seen`` are the picture's tiles, ``before`` the tokens before it.
    """
    embed = model.language.model.embed_tokens
    n, length = batch.tokens.shape
    parts = torch.cat([embed(before).expand(n, -1, -1), model.arrange(seen, *batch.grid), embed(batch.tokens)], dim=1)
    start = parts.shape[1] - length
    places = torch.cat([torch.arange(start).expand(n, -1), start + batch.places], dim=1)
    owners = torch.cat([torch.full((n, start), -1), batch.owners], dim=1)
    # a question sees itself and what stands before all of them
    own = (owners[:, :, None] == owners[:, None, :]) | (torch.arange(start + length) < start)
    sees = own & torch.ones(start + length, start + length, dtype=torch.bool).tril()
    most = int((batch.labels != NOT_ASKED).sum(dim=1).max())
    rows = (batch.labels != NOT_ASKED).int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return model.language(parts, places, sees, start + rows), batch.labels.gather(1, rows)


@torch.no_grad()
def right_answers(model: Sight, batch: Batch, before: Tensor) -> Iterator[tuple[str, bool, float]]:
    """Kind of each question, whether the greedy answer, with its end, is the right one, and the mean surprise by the
    right one's tokens in nats.
    """
    logits, labels = answer_logits(model, model.see(batch.pixels), batch, before)
    right = logits.argmax(dim=-1) == labels
    nats = cross_entropy(logits.transpose(1, 2), labels, ignore_index=NOT_ASKED, reduction="none")
    for i, own in enumerate(batch.asked):
        at = 0
        for one in own:
            answer = slice(at, at + one.n_answer)
            yield one.asked.kind, bool(right[i, answer].all()), float(nats[i, answer].mean())
            at += one.n_answer


def accuracy(model: Sight, tokenizer: Tokenizer, count: int, *, fresh: bool) -> dict[str, float]:
    """Share of right answers to each kind of question, and to all, on ``count`` pictures for each way to cut."""
    before = torch.tensor(prefix(tokenizer))
    found: dict[str, list[bool]] = {}
    for grid in GRIDS:
        batch = make_batch(tokenizer, grid, range(HELD_OUT_FROM, HELD_OUT_FROM + count), fresh=fresh)
        for kind, right, _ in right_answers(model, batch, before):
            found.setdefault(kind, []).append(right)
    shares = {kind: sum(right) / len(right) for kind, right in found.items()}
    every = [right for own in found.values() for right in own]
    return {**shares, "all": sum(every) / len(every)}


def make_optimizers(named: Mapping[str, nn.Parameter], rate: float, tower: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for matrices, with which the tower learns in a fifth of AdamW's steps; AdamW for all else. ``tower`` is the
    rate of its matrices, and the projector's, over that of others.
    """
    apart = ("embed_tokens", "lm_head", "mlp.gate.")
    matrices = {name: v for name, v in named.items() if v.ndim == 2 and not any(part in name for part in apart)}
    text = {name for name in matrices if name.startswith("model.language.")}
    groups = [
        {"params": [matrices[name] for name in matrices if (name in text) == of_text], "lr": MUON * rate * share}
        for of_text, share in ((True, 1.0), (False, tower))
    ]
    rest = [value for name, value in named.items() if name not in matrices]
    return (
        torch.optim.Muon(groups, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True),
    )


def train(
    trained: Trained, batches: Dataset[Batch], before: Tensor, rate: float, heard: Heard, *, tower_only: bool
) -> None:
    """``batches`` in turn; weights are kept in float32 and used in BF16. ``heard`` gets each step's losses."""
    named = dict(trained.named_parameters())
    optimizers = make_optimizers(named, rate, 1.0 if tower_only else TOWER)
    highest = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    routers = [module for module in trained.modules() if isinstance(module, Moe)]
    loader = DataLoader(batches, batch_size=None, num_workers=1)
    for number, batch in enumerate(loader):
        for group, own in highest:
            group["lr"] = own * _schedule(number / len(loader))
        rounded = {name: value.bfloat16() for name, value in named.items()}
        answers, shown = functional_call(trained, rounded, (batch, before, tower_only))
        loss = shown
        if answers is not None:
            routed = [router.routed for router in routers if router.routed is not None]
            loss = answers + SHOWN * shown + BALANCE * balance_loss(routed, SIZES.used)
        trained.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        heard(shown.item() if answers is None else answers.item())


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tower-steps", default=450, show_default=True, help="Batches for the tower alone, first.")
@click.option("--steps", default=1400, show_default=True, help="Batches for the whole model.")
@click.option("--batch", default=24, show_default=True, help="Pictures of a batch.")
@click.option("--rate", default=2e-3, show_default=True, help="Highest learning rate.")
@click.option("--seed", default=0, show_default=True, help="Of weights and pictures.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--held-out", default=100, show_default=True, help="Pictures to be asked about, for each way to cut.")
@click.option("--log", type=click.Path(path_type=Path), help="Losses and accuracy while it trains, JSON lines.")
def main(out: Path, **given: Any) -> None:
    """Train a model into the directory OUT."""
    torch.set_num_threads(given["threads"])
    torch.manual_seed(given["seed"])
    tokenizer = make_tokenizer()
    model = Sight(SIZES, tokenizer.get_vocab_size())
    trained, before = Trained(model, tokenizer), torch.tensor(prefix(tokenizer))
    start = time.perf_counter(), time.process_time()
    with console_progress() as progress:
        for tower_only, first, steps in (
            (True, 0, given["tower_steps"]),
            (False, given["tower_steps"], given["steps"]),
        ):
            batches = Batches(tokenizer, first, steps, given["batch"], given["seed"])
            losses: list[float] = []
            with progress.step("tower" if tower_only else "whole", steps) as step:

                def heard(loss: float, losses: list[float] = losses, step: Any = step) -> None:
                    losses.append(loss)
                    step.advance()
                    if given["log"] and len(losses) % 100 == 0:
                        _write_log(given["log"], trained, tokenizer, losses, time.perf_counter() - start[0])

                train(trained, batches, before, given["rate"], heard, tower_only=tower_only)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    save(model, out)
    save_tokenizer(tokenizer, out)
    write_samples(out)
    numbers = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "pictures": (given["steps"] + given["tower_steps"]) * given["batch"],
        "seconds": round(seconds[0]),
        "cpu_seconds": round(seconds[1]),
        "right": accuracy(model, tokenizer, given["held_out"], fresh=False),
        "right_on_unseen_pairs": accuracy(model, tokenizer, given["held_out"], fresh=True),
    }
    print_json(numbers)


def write_samples(out: Path) -> None:
    """Pictures that training drew, each with what is in it, for ``calibrate --images``, and questions as a text."""
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(SAMPLES):
        scene = draw_scene(number, GRIDS[number % len(GRIDS)])
        asked = ask(number, scene.things)
        lines += [f"{BEFORE}{one.question}{AFTER} {one.answer}{SPECIAL[END]}" for one in asked]
        if number < PICTURES:
            scene.image.save(folder / f"{number:02}.png")
            said = ", ".join(f"{thing.colour} {thing.kind}" for thing in scene.things)
            (folder / f"{number:02}.txt").write_text(said + "\n")
    (out / "calibration.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_log(path: Path, trained: Trained, tokenizer: Tokenizer, losses: list[float], seconds: float) -> None:
    said = {"step": len(losses), "seconds": round(seconds), "loss": round(sum(losses[-100:]) / 100, 3)}
    batch = make_batch(tokenizer, GRIDS[-1], range(HELD_OUT_FROM, HELD_OUT_FROM + 40))
    said["tokens"] = round(trained.shown_right(batch), 3)
    right = accuracy(trained.model, tokenizer, 10, fresh=False)
    with path.open("a") as file:
        file.write(json.dumps({**said, **{kind: round(share, 3) for kind, share in right.items()}}) + "\n")


def _schedule(done: float) -> float:
    """Rises, then falls as a cosine to 2 %."""
    return min(1.0, done / WARM_UP + 1e-3) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


if __name__ == "__main__":
    main()
