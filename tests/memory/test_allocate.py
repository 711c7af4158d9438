"""The allocator on graphs that can be followed by hand; sizes are multiples of the alignment unless said."""

from __future__ import annotations

import random

import pytest

from mopeq_edge.ggml.types import BY_NAME, F16, F32
from mopeq_edge.memory import graph as g
from mopeq_edge.memory.allocate import buffer_size
from mopeq_edge.memory.graph import Graph, Tensor

ROW = 64
"""Numbers of a row: 256 bytes in F32."""


def rows(n: int) -> Tensor:
    return g.new_input(F32, ROW, n)


def size_of(*outputs: Tensor) -> int:
    graph = Graph()
    for tensor in outputs:
        graph.add(tensor)
    return buffer_size(graph)


def copy(x: Tensor) -> Tensor:
    return g.cont(x)


def test_a_chain_needs_two_buffers() -> None:
    x = rows(1)
    for _ in range(5):
        x = copy(x)
    assert size_of(x) == 2 * 256


def test_ops_in_place_need_one() -> None:
    x = rows(1)
    for _ in range(5):
        x = g.same("rms_norm", x)
    assert size_of(x) == 256


def test_no_op_in_place_over_what_another_reads() -> None:
    x = rows(1)
    assert size_of(g.same("add", g.same("rms_norm", x), x)) == 2 * 256


def test_no_op_in_place_over_another_layout() -> None:
    x = rows(2)
    assert size_of(g.same("rms_norm", g.view(x, (ROW, 1)))) == 512 + 256


def test_no_op_in_place_over_a_view() -> None:
    """ggml takes over the memory of tensors, never that of views."""
    x = rows(2)
    assert size_of(g.same("rms_norm", g.reshape(x, 2 * ROW))) == 2 * 512


def test_an_output_keeps_its_memory() -> None:
    x = copy(rows(1))
    kept = copy(x)
    kept.output = True
    last = copy(copy(copy(kept)))
    # the input's and the copy's places are free for the chain, the output's is not
    assert size_of(last) == 3 * 256


def test_a_view_keeps_its_owner_alive() -> None:
    x = copy(rows(4))
    part = g.view(x, (ROW, 1))
    graph = Graph()
    graph.add(x)
    other = graph.add(copy(rows(1)))
    graph.add(g.same("add", other, part))
    # input 1024 free again, x 1024 alive for its view, the other input 256 and its copy 256 in the hole
    assert buffer_size(graph) == 1024 + 256 + 1024


def test_weights_take_no_room() -> None:
    w = g.weight(F32, ROW, 128)
    assert size_of(g.mul_mat(w, rows(2))) == 512 + 128 * 2 * 4


def test_sizes_are_rounded_to_the_alignment() -> None:
    x = g.new_input(F32, 3)
    assert size_of(copy(x)) == 2 * 32


def test_the_smallest_hole_that_fits_is_taken() -> None:
    graph = Graph()
    inputs = [rows(n) for n in (4, 1, 2, 1, 8)]
    for x in inputs:
        graph.leafs.append(x)
    # frees the holes of 4 and of 2 rows, one copy each, then asks for one of 2
    first, second = g.Tensor(F32, (1,), "cont", (inputs[0],)), g.Tensor(F32, (1,), "cont", (inputs[2],))
    third = g.Tensor(F32, (ROW, 2), "cont", (inputs[4],))
    graph.nodes += [first, second, third]
    # inputs 16 rows; first behind them (32 bytes), second in the hole of 4 rows, third exactly in that of 2
    assert buffer_size(graph) == 16 * 256 + 32


def test_quantized_and_strided_sizes() -> None:
    assert g.new_input(BY_NAME["Q8_0"], 64, 3).nbytes == 3 * 68
    x = g.new_input(F32, 64, 4)
    assert g.view(x, (32, 4), x.nb[1:2]).nbytes == 3 * 256 + 32 * 4
    assert not g.view(x, (32, 4), x.nb[1:2]).contiguous
    assert g.permute(g.new_input(F16, 8, 2, 3), 0, 2, 1, 3).ne == (8, 3, 2, 1)


@pytest.mark.parametrize("seed", range(20))
def test_never_less_than_what_lives_at_once(seed: int) -> None:
    """Random graphs of copies and sums: the buffer holds whatever some node and its sources take together."""
    draw = random.Random(seed)
    made = [rows(draw.randrange(1, 6)) for _ in range(3)]
    graph = Graph()
    for _ in range(25):
        x = draw.choice(made)
        made.append(copy(x) if draw.random() < 0.5 else g.same("add", x, x))
        graph.add(made[-1])
    together = max(
        node.nbytes * (node.op == "cont") + sum({s: s.nbytes for s in node.sources}.values()) for node in graph.nodes
    )
    every = sum(t.nbytes for t in (*graph.nodes, *graph.leafs))
    assert together <= buffer_size(graph) <= every
