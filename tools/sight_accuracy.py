"""How often a tiny-sight model answers right about held-out pictures: in torch, and each GGUF on the device.

``python -m tools.sight_accuracy examples/tiny-sight out.gguf`` draws pictures that training never drew, half of them
with pairs of colour and thing that it never drew either, and asks about them: onnxruntime and llama.cpp, greedily, as
``run --image`` does. An answer is right if it is the whole answer; nats are those of the right answer's tokens. Two
controls tell sight from guessing: the same questions about a grey picture of the same size, and about the picture of
another question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from rich.table import Table
from tokenizers import Tokenizer

from mopeq_edge.binding import LlamaModel
from mopeq_edge.cli.console import console_progress, print_json, print_table, threads_option
from mopeq_edge.evaluate.divergence import log_softmax
from mopeq_edge.gguf_file import read_header
from mopeq_edge.progress import Progress
from mopeq_edge.vision.description import vision_beside
from mopeq_edge.vision.prompt import lay_out
from mopeq_edge.vision.session import Floats
from mopeq_edge.vision.tower import Tower
from tools.sight_batches import make_batch
from tools.sight_model import load
from tools.sight_pictures import GRIDS, KINDS, Asked, draw_scene
from tools.sight_text import prefix
from tools.train_sight import HELD_OUT_FROM, right_answers

QUESTIONS = 3
"""About each picture, at most."""
NATS = "nats"
SEEN, GREY, OTHER = "seen", "grey", "other"
"""Which picture is shown with a question: its own, a grey one, another question's."""


Files = Mapping[str, tuple[Path, Path]]
"""By name a GGUF and the vision file that it sees with."""


@dataclass(frozen=True)
class Case:
    """A picture with its questions; ``fresh``: of pairs that training never drew."""

    image: Image.Image
    asked: tuple[Asked, ...]
    fresh: bool


@dataclass(frozen=True)
class Answer:
    """One answer, whether it is right, and the mean surprise by the right one's tokens in nats."""

    kind: str
    fresh: bool
    right: bool
    nats: float


def cases(tokenizer: Tokenizer, count: int) -> Iterator[tuple[Case, Any]]:
    """``count`` pictures, in turn of every way to be cut and with known and with fresh pairs; with the batch of each
    for torch.
    """
    for number in range(count):
        grid, fresh = GRIDS[number % len(GRIDS)], number // len(GRIDS) % 2 == 1
        seed = HELD_OUT_FROM + number
        batch = make_batch(tokenizer, grid, [seed], fresh=fresh, most=QUESTIONS)
        asked = tuple(one.asked for one in batch.asked[0])
        if asked:
            yield Case(draw_scene(seed, grid, fresh=fresh).image, asked, fresh), batch


def in_torch(directory: Path, tokenizer: Tokenizer, batches: Sequence[Any], asked: Sequence[Case]) -> list[Answer]:
    """Answers of the checkpoint in ``directory`` in float32."""
    model, before = load(directory), torch.tensor(prefix(tokenizer))
    return [
        Answer(kind, case.fresh, right, nats)
        for case, batch in zip(asked, batches, strict=True)
        for kind, right, nats in right_answers(model, batch, before)
    ]


def on_device(
    gguf: Path, tower: Tower, pictures: Sequence[Floats], asked: Sequence[Case], threads: int, progress: Progress
) -> list[Answer]:
    """Answers of ``gguf`` to the questions of ``asked``; ``pictures`` are the embeddings of each."""
    found = []
    end = read_header(gguf).get("tokenizer.ggml.eos_token_id")
    with (
        LlamaModel(gguf, n_ctx=512, n_threads=threads) as model,
        progress.step(gguf.name, len(asked)) as step,
    ):
        for case, picture in zip(asked, pictures, strict=True):
            for one in case.asked:
                parts = lay_out(model, tower.description, one.question, [picture])
                answer = np.append(model.tokenize(f" {one.answer}"), end).astype(np.int32)
                # what is generated greedily is the answer if each of its tokens is the likeliest behind those before it
                rows = model.mixed_logits([*parts, answer[:-1]], sum(map(len, parts)) - 1)
                surprise = -log_softmax(rows)[np.arange(len(answer)), answer]
                right = bool((rows.argmax(axis=1) == answer).all())
                found.append(Answer(one.kind, case.fresh, right, float(surprise.mean())))
            step.advance()
    return found


def shown(tower: Tower, asked: Sequence[Case], which: str) -> list[Floats]:
    """The tower's embeddings of the picture that goes with each of ``asked``."""
    if which == SEEN:
        return [tower.embed([case.image])[0] for case in asked]
    if which == GREY:
        return [tower.embed([Image.new("RGB", case.image.size, (128, 128, 128))])[0] for case in asked]
    return shown(tower, [*asked[1:], asked[0]], SEEN)


def guessed(asked: Sequence[Case]) -> float:
    """Share of right answers of who knows how often each answer is right, and sees nothing."""
    told: dict[str, Counter[str]] = {}
    for one in (one for case in asked for one in case.asked):
        told.setdefault(one.kind, Counter())[one.answer] += 1
    return sum(max(counts.values()) for counts in told.values()) / sum(c.total() for c in told.values())


def shares(answers: Sequence[Answer]) -> dict[str, float]:
    """Right answers of all, of known and fresh pairs, and of each kind of question; and the mean of their nats."""
    groups = {
        "all": answers,
        "known": [a for a in answers if not a.fresh],
        "fresh": [a for a in answers if a.fresh],
        **{kind: [a for a in answers if a.kind == kind] for kind in KINDS},
    }
    found = {name: sum(a.right for a in own) / len(own) for name, own in groups.items() if own}
    return {**found, NATS: sum(a.nats for a in answers) / len(answers)}


@dataclass(frozen=True)
class Measured:
    """Shares of right answers by model or control, and of what they are shares."""

    rows: dict[str, dict[str, float]]
    n_questions: int
    by_guessing: float


def measure(
    checkpoint: Path,
    files: Files,
    count: int,
    *,
    controls: bool,
    threads: int,
    progress: Progress,
) -> Measured:
    """``checkpoint`` in torch and ``files``, by name a GGUF and its vision file, on ``count`` pictures; with
    ``controls`` the first file also sees other pictures.
    """
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    asked, batches = zip(*cases(tokenizer, count), strict=True)
    rows = {"checkpoint, torch": shares(in_torch(checkpoint, tokenizer, batches, asked))}
    seen: dict[Path, list[Floats]] = {}
    towers: dict[Path, Tower] = {}
    for name, (gguf, vision) in files.items():
        if vision not in seen:
            towers[vision] = Tower(vision, threads)
            seen[vision] = shown(towers[vision], asked, SEEN)
        rows[name] = shares(on_device(gguf, towers[vision], seen[vision], asked, threads, progress))
    if files and controls:
        name, (gguf, vision) = next(iter(files.items()))
        for which in (GREY, OTHER):
            pictures = shown(towers[vision], asked, which)
            rows[f"{name}, {which} picture"] = shares(
                on_device(gguf, towers[vision], pictures, asked, threads, progress)
            )
    return Measured(rows, sum(len(case.asked) for case in asked), guessed(asked))


def shares_table(found: Measured) -> Table:
    """One row for each model or control, in percent."""
    caption = f"right answers in percent to {found.n_questions} questions; {100 * found.by_guessing:.1f} by guessing"
    table = Table(title="Held-out pictures", caption=caption)
    columns = list(next(iter(found.rows.values())))
    table.add_column("Model")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in found.rows.items():
        table.add_row(name, *(f"{row[c]:.3f}" if c == NATS else f"{100 * row[c]:.1f}" for c in columns))
    return table


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("ggufs", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--pictures", default=300, show_default=True, help="Pictures, with up to three questions each.")
@click.option("--controls/--no-controls", default=True, help="Also ask the first GGUF about other pictures.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(checkpoint: Path, ggufs: tuple[Path, ...], pictures: int, controls: bool, threads: int, as_json: bool) -> None:
    """Ask CHECKPOINT in torch, and GGUFS on the device, each with the vision file beside it."""
    torch.set_num_threads(threads)
    files = {gguf.name: (gguf, vision_beside(gguf)) for gguf in ggufs}
    with console_progress() as progress:
        found = measure(checkpoint, files, pictures, controls=controls, threads=threads, progress=progress)
    show(found, as_json)


def show(found: Measured, as_json: bool) -> None:
    """As a table, or JSON."""
    if as_json:
        print_json(asdict(found))
    else:
        print_table(shares_table(found))


if __name__ == "__main__":
    main()
