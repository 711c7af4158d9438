"""The binding against llama.cpp itself: tokens, logits in one batch and one by one, and failed loads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.binding import LlamaModel, library_version
from mopeq_edge.errors import MopeqError
from mopeq_edge.evaluate.divergence import compare
from mopeq_edge.gguf_file import KV, ValueType, read_header
from mopeq_edge.gguf_layout import layout
from mopeq_edge.llama_cpp.bundle import STOCK
from mopeq_edge.runtime.locate import require_runtime

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def model(bf16_gguf: Path) -> Iterator[LlamaModel]:
    with LlamaModel(bf16_gguf, n_ctx=256) as opened:
        yield opened


def vocabulary_only(source: Path, path: Path, **changes: KV) -> Path:
    """The tokenizer of ``source`` as a GGUF without tensors."""
    kvs = read_header(source).kvs
    kept = {name: kv for name, kv in kvs.items() if name.startswith(("tokenizer.", "general.architecture"))}
    path.write_bytes(layout({**kept, **changes}, []).header)
    return path


def test_tokens_of_a_file_without_tensors_are_those_of_the_model(
    model: LlamaModel, bf16_gguf: Path, evaluation_text: str, tmp_path: Path
) -> None:
    with LlamaModel(vocabulary_only(bf16_gguf, tmp_path / "vocabulary.gguf"), vocab_only=True) as vocabulary:
        expected = model.tokenize(evaluation_text, add_special=True)
        got = vocabulary.tokenize(evaluation_text, add_special=True)
        assert len(got) > 10000
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, expected)
        assert (vocabulary.n_vocab, vocabulary.bos, vocabulary.add_bos) == (model.n_vocab, model.bos, model.add_bos)
        with pytest.raises(ValueError, match="has no context"):
            vocabulary.logits([1])


def test_text_survives_the_round_trip(model: LlamaModel, evaluation_text: str) -> None:
    text = evaluation_text[:5000] + " é 漢字 🙂"
    assert model.detokenize(model.tokenize(text)) == text
    assert len(model.tokenize("")) == 0


def test_control_tokens_are_text_unless_asked(model: LlamaModel) -> None:
    control = "<|endoftext|>"
    assert len(model.tokenize(control)) > 1
    assert model.tokenize(control, parse_special=True).tolist() == [model.bos]
    assert model.detokenize([model.bos]) == ""
    assert model.detokenize([model.bos], special=True) == control


def test_bos_is_added_where_the_vocabulary_asks_for_it(bf16_gguf: Path, tmp_path: Path) -> None:
    wish = {"tokenizer.ggml.add_bos_token": KV(ValueType.BOOL, True)}
    with LlamaModel(vocabulary_only(bf16_gguf, tmp_path / "bos.gguf", **wish), vocab_only=True) as vocabulary:
        assert vocabulary.add_bos
        plain = vocabulary.tokenize("hello").tolist()
        assert vocabulary.tokenize("hello", add_special=True).tolist() == [vocabulary.bos, *plain]


def test_a_sequence_is_fresh_every_time(model: LlamaModel, evaluation_text: str) -> None:
    tokens = model.tokenize(evaluation_text)[:300]
    once = model.logits(tokens[:40])
    model.logits(tokens[100:300])
    np.testing.assert_array_equal(model.logits(tokens[:40]), once)
    assert once.shape == (40, model.n_vocab)
    assert once.dtype == np.float32


def test_a_position_sees_only_what_is_before_it(model: LlamaModel, evaluation_text: str) -> None:
    tokens = model.tokenize(evaluation_text)[:64]
    changed = tokens.copy()
    changed[40] = (changed[40] + 1) % model.n_vocab
    a, b = model.logits(tokens), model.logits(changed)
    np.testing.assert_allclose(a[:40], b[:40], atol=1e-4)
    assert np.abs(a[40:] - b[40:]).max() > 0.1


@pytest.mark.parametrize("first", [0, 1, 31, 32, 50, 99])
def test_rows_from_first_on_are_the_same_rows_across_batches(
    bf16_gguf: Path, model: LlamaModel, evaluation_text: str, first: int
) -> None:
    tokens = model.tokenize(evaluation_text)[:100]
    with LlamaModel(bf16_gguf, n_ctx=256, n_batch=32) as split:
        rows = split.logits(tokens, first)
    assert rows.shape == (100 - first, model.n_vocab)
    whole = model.logits(tokens)[first:]
    # Routers that nearly tie may fall the other way in another batch; a wrong row differs by more everywhere.
    assert np.median(np.abs(rows - whole).max(axis=1)) < 0.05


@pytest.mark.parametrize("model_name", ["bf16_gguf", "q2_k", "q4_k_m"])
def test_one_batch_and_token_by_token_agree(
    model_name: str, request: pytest.FixtureRequest, evaluation_text: str
) -> None:
    with LlamaModel(request.getfixturevalue(model_name), n_ctx=256, plain=True) as model:
        tokens = model.tokenize(evaluation_text)
        differences, klds = [], []
        for start in range(0, 800, 100):
            window = tokens[start : start + 12]
            batch, steps = model.logits(window), model.step_logits(window)
            differences.append(np.abs(batch - steps).max(axis=1))
            klds.append(compare(batch, steps, window).kld)
    # ggml rounds activations to BF16 or 8 bit; where batch and step round apart, a router that nearly ties
    # falls the other way. So most rows must agree closely and all of them in what they predict.
    close = np.mean(np.concatenate(differences) < 1e-2)
    assert close > 0.75
    assert np.mean(klds) < 1e-4


def test_greedy_is_the_argmax_of_each_step(model: LlamaModel, evaluation_text: str) -> None:
    prompt = model.tokenize(evaluation_text)[:30].tolist()
    text = model.greedy(prompt, 12)
    assert len(text) == 12
    assert text == model.greedy(prompt, 12)
    chosen = model.step_logits([*prompt, *text]).argmax(axis=1)[29:-1]
    # The prompt went in as one batch and may round apart from single steps, but not at every token.
    assert np.mean(chosen == text) > 0.8


def test_logits_after_a_prompt_are_those_of_generation(model: LlamaModel, evaluation_text: str) -> None:
    prompt = model.tokenize(evaluation_text)[:30]
    text = model.greedy(prompt, 12)
    rows = model.logits_after(prompt, text)
    assert rows.shape == (13, model.n_vocab)
    assert rows.argmax(axis=1)[:12].tolist() == text
    np.testing.assert_allclose(rows[0], model.logits(prompt)[-1], atol=1e-4)
    with pytest.raises(MopeqError, match="do not fit into its context"):
        model.logits_after([5] * 200, [5] * 57)


def test_what_the_context_has_can_be_kept(model: LlamaModel, evaluation_text: str) -> None:
    """Another end behind the same beginning: the rows of a fresh sequence."""
    tokens = model.tokenize(evaluation_text)[:60]
    expected = model.logits(tokens, first=59)[0]
    other = np.concatenate([tokens[:40], tokens[:15]])
    assert list(model.continuation([other], 3, lambda row: int(row.argmax())))
    assert model.n_past == 57  # the last of three tokens is not decoded
    batches = list(model.row_batches([tokens], 59, kept=40))
    assert (len(batches), batches[-1][0], model.n_past) == (1, 59, 60)
    # sums of other batches round differently
    assert np.abs(batches[-1][1][0] - expected).max() < 0.05 * expected.std()
    # kept to the last but one, in parts: only one token is computed
    ((at, rows),) = model.row_batches([tokens[:50], tokens[50:]], kept=59)
    assert (at, len(rows)) == (59, 1)
    for kept in (60, 61, -1):
        with pytest.raises(ValueError, match=f"cannot keep {kept} of 60 tokens"):
            next(model.row_batches([tokens], kept=kept))


def test_bytes_of_tokens_are_the_text(model: LlamaModel, evaluation_text: str) -> None:
    tokens = model.tokenize(evaluation_text[:400])
    assert b"".join(model.piece(int(token)) for token in tokens).decode() == evaluation_text[:400]
    assert model.piece(model.bos) == b""
    assert model.ends(model.bos)  # here the same token begins and ends


def test_greedy_stops_at_the_context(model: LlamaModel) -> None:
    with pytest.raises(MopeqError, match=r"257 tokens do not fit into its context of 256"):
        model.greedy([5] * 200, 57)


def test_tokens_that_do_not_fit(model: LlamaModel) -> None:
    with pytest.raises(MopeqError, match=r"300 tokens do not fit into its context of 256; give fewer"):
        model.logits([5] * 300)
    with pytest.raises(MopeqError, match=r"cannot decode \(status -1\): .*invalid token"):
        model.logits([model.n_vocab])
    with pytest.raises(ValueError, match="one row of tokens"):
        model.logits([])


def test_the_log_is_silent(bf16_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LlamaModel(bf16_gguf, n_ctx=64) as first, LlamaModel(bf16_gguf, n_ctx=64) as second:
        first.logits([1, 2])
        first.close()
        second.logits([1, 2])
    with pytest.raises(MopeqError):
        LlamaModel(tmp_path / "missing.gguf")
    assert capfd.readouterr() == ("", "")


def test_closing_twice_is_harmless_and_a_closed_model_says_so(bf16_gguf: Path) -> None:
    model = LlamaModel(bf16_gguf, n_ctx=64)
    model.close()
    model.close()
    with pytest.raises(ValueError, match="is closed"):
        model.logits([1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[: len(data) // 2], r"data is not within the file bounds"),
        (lambda data: data[:2000], r"failed to read"),
        (lambda data: b"abcd" + data[4:], r"invalid magic characters: 'abcd'"),
        (lambda data: data.replace(b"blk.2.ffn_up_exps", b"blk.2.ffn_xx_exps"), r"blk.2.ffn_up_exps.weight' not found"),
        (lambda data: b"", r"cannot load it: \S"),
    ],
)
def test_a_file_that_does_not_load_gives_llama_cpps_reason_in_one_line(
    bf16_gguf: Path, tmp_path: Path, change: object, message: str
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(change(bf16_gguf.read_bytes()))
    with pytest.raises(MopeqError, match=message) as caught:
        LlamaModel(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: llama.cpp cannot load it: ")
    assert "\n" not in text


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MopeqError, match=r"none.gguf: llama.cpp cannot load it: .*No such file"):
        LlamaModel(tmp_path / "none.gguf")


def test_the_version_names_both_packages() -> None:
    assert library_version().startswith("llama.cpp ")
    assert "llama-cpp-python 0." in library_version()


def test_a_per_expert_file_in_a_stock_llama_cpp_says_which_one_runs_it(tmp_path: Path) -> None:
    """In a process of its own, since the libraries are chosen once."""
    file = tmp_path / "x.gguf"
    key = "mopeq.expert_groups.version"
    kvs = {"general.architecture": KV(ValueType.STRING, "olmoe"), key: KV(ValueType.UINT32, 1)}
    file.write_bytes(layout(kvs, []).header)
    stock = require_runtime(STOCK).bin
    code = (
        "import sys\nfrom pathlib import Path\nfrom mopeq_edge.binding import LlamaModel\n"
        "from mopeq_edge.errors import MopeqError\n"
        "try: LlamaModel(Path(sys.argv[1]))\nexcept MopeqError as error: print(error)"
    )
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(stock)}
    done = subprocess.run([sys.executable, "-c", code, file], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"{file}: has experts of different types (expert groups, version 1), which the llama.cpp in {stock} does not "
        "run; leave LLAMA_CPP_LIB_PATH unset and use the patched llama.cpp (mopeq-edge runtime install)\n"
    )
