"""Pictures and questions of the tiny-sight model: right by the pixels, and held-out pairs are held out."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageChops
from tokenizers import Tokenizer

from mopeq_edge.vision.tiles import cut
from tools.sight_batches import NOT_ASKED, make_batch
from tools.sight_model import LAYOUT, SIZES
from tools.sight_pictures import (
    COLOURS,
    COUNTS,
    EXISTS,
    GRIDS,
    HELD_OUT,
    KINDS,
    PAIRS,
    SHAPES,
    Scene,
    Thing,
    ask,
    draw_scene,
)
from tools.sight_text import END, SPECIAL, encode, make_tokenizer, prefix

SEEDS = range(40)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed, grid, fresh=seed % 2 == 1) for seed in SEEDS for grid in GRIDS]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def test_a_seed_is_a_picture() -> None:
    one, same, other = draw_scene(3, (2, 2)), draw_scene(3, (2, 2)), draw_scene(4, (2, 2))
    assert one.things == same.things
    assert ImageChops.difference(one.image, same.image).getbbox() is None
    assert other.things != one.things
    assert [a.question for a in ask(1, one.things)] == [a.question for a in ask(1, same.things)]


def test_pictures_are_cut_as_asked(scenes: list[Scene]) -> None:
    for scene, grid in zip(scenes, list(GRIDS) * len(SEEDS), strict=True):
        place = cut(scene.image, LAYOUT, 1)
        assert (place.columns, place.rows) == grid


def test_things_are_where_they_are_said_to_be(scenes: list[Scene]) -> None:
    """By the pixels: the colour in the middle of every shape, which is filled, is the nearest of all to its name's."""
    seen = 0
    names, values = list(COLOURS), np.array(list(COLOURS.values()))
    for scene in scenes:
        width, height = scene.image.size
        for thing in scene.things:
            if thing.kind in SHAPES:
                pixel = scene.image.getpixel((int(thing.x * width), int(thing.y * height)))
                nearest = int(np.abs(values - np.array(pixel)).sum(axis=1).argmin())
                assert names[nearest] == thing.colour, (thing, pixel)
                seen += 1
    assert seen > 100


def test_held_out_pairs_are_never_drawn_in_training(scenes: list[Scene]) -> None:
    assert len(HELD_OUT) == 9
    assert {colour for colour, _ in PAIRS} == set(COLOURS)
    # each colour and each thing is trained with others
    assert {colour for colour, _ in set(PAIRS) - HELD_OUT} == set(COLOURS)
    assert {kind for _, kind in set(PAIRS) - HELD_OUT} == {kind for _, kind in PAIRS}
    for seed in range(300):
        things = draw_scene(seed, GRIDS[seed % len(GRIDS)]).things
        assert not {(thing.colour, thing.kind) for thing in things} & HELD_OUT
    fresh = [draw_scene(seed, (2, 2), fresh=True).things for seed in range(20)]
    assert all({(thing.colour, thing.kind) for thing in things} & HELD_OUT for things in fresh)


def test_answers() -> None:
    """By hand."""
    things = (
        Thing("red", "7", 0.2, 0.8, 0.1),
        Thing("blue", "star", 0.7, 0.45, 0.1),
        Thing("red", "star", 0.95, 0.1, 0.1),
    )
    found = {asked.kind: asked for asked in ask(0, things)}
    # what two things share is not asked about
    assert (found["colour"].question, found["colour"].answer) == ("What colour is the 7?", "red")
    assert (found["thing"].question, found["thing"].answer) == ("What is blue?", "star")
    assert found["count"].answer == "three"
    # nor what is in the middle
    assert found["across"].question == "Is the blue thing on the left or the right?"
    assert found["across"].answer == "right"
    assert "down" not in found
    assert next(iter(ask(0, things[:1], ["down"]))).answer == "bottom"
    assert found["caption"].answer == "red 7, blue star, red star"
    # too near to each other to be told from left to right
    near = (things[0], Thing("blue", "star", 0.25, 0.1, 0.1))
    assert "caption" not in {asked.kind for asked in ask(0, near)}
    for seed in range(60):
        (exists,) = ask(seed, things, [EXISTS])
        there = any(exists.question.endswith((f" {thing.colour}?", f" {thing.kind}?")) for thing in things)
        assert exists.answer == ("yes" if there else "no")


def test_tokens_are_those_of_the_device_s_prompt(tokenizer: Tokenizer) -> None:
    things = (Thing("orange", "circle", 0.2, 0.2, 0.1),)
    for asked in ask(5, things):
        one = encode(tokenizer, asked)
        text = tokenizer.decode([*prefix(tokenizer), *one.tokens], skip_special_tokens=False)
        expected = f"{SPECIAL[0]}<|User|>: \n{asked.question}\n\n<|Assistant|>: {asked.answer}{SPECIAL[END]}"
        assert text.replace("> :", ">:").replace("|> ", "|>") == expected.replace("|> ", "|>")
        assert one.tokens[-1] == END
        assert tokenizer.decode(one.tokens[-one.n_answer : -1]) == f" {asked.answer}"
    # every word is one token
    for word in (*COLOURS, *COUNTS, *SHAPES, "left", "bottom", "yes"):
        assert len(tokenizer.encode(f" {word}").ids) == 1


def test_a_batch(tokenizer: Tokenizer) -> None:
    batch = make_batch(tokenizer, (3, 1), range(5))
    assert batch.pixels.shape == (5, 4, 3, 30, 30)
    assert batch.covered.shape == (5, 4, SIZES.rows**2, 2)
    for i, own in enumerate(batch.asked):
        at = 0
        for number, one in enumerate(own):
            part = slice(at, at + len(one.tokens))
            assert batch.tokens[i, part].tolist() == list(one.tokens)
            assert batch.places[i, part].tolist() == list(range(len(one.tokens)))
            assert set(batch.owners[i, part].tolist()) == {number}
            # of each answer every token is predicted by the one before it
            wanted = [NOT_ASKED] * (len(one.tokens) - one.n_answer - 1) + [*one.tokens[-one.n_answer :], NOT_ASKED]
            assert batch.labels[i, part].tolist() == wanted
            at += len(one.tokens)
        assert set(batch.owners[i, at:].tolist()) <= {-1}
    # every thing covers a token of the tiles, and only colours and kinds of the picture are seen
    for seed in range(5):
        things = draw_scene(seed, (3, 1)).things
        shown = {tuple(pair) for pair in batch.covered[seed, 1:].flatten(0, 1).tolist()} - {(0, 0)}
        named = {(1 + list(COLOURS).index(t.colour), 1 + [k for _, k in PAIRS[:9]].index(t.kind)) for t in things}
        assert shown == named
    assert len(make_batch(tokenizer, (1, 1), [7], most=2).asked[0]) <= 2
    assert {one.asked.kind for own in batch.asked for one in own} <= set(KINDS)
