"""The vocabularies of the Llama kind, against llama.cpp's converter, SentencePiece and transformers.

llama.cpp's script runs once over all checkpoints; the same directories are opened by us.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from converters import CONVERTERS
from converters.llama_vocabulary import add_llama_vocabulary
from converters.vocabulary import add_bpe_vocabulary
from mopeq_edge.errors import MopeqError, SourceError
from mopeq_edge.gguf_file import read_header
from mopeq_edge.runtime.locate import require_runtime
from mopeq_edge.source.open import open_source

from ..builders import EXAMPLE_TEXT, edit_json, write_gguf
from .sentencepiece_models import SIZE, VOCAB, add_json, add_model, build, encoded, trained

TEXTS = (
    *("Hello  world", "\n\nA new\nline ", " leading", "   ", "", "tab\there 12345", "two words", "\r\n"),
    *("ném über 日本語 Ελληνικά", "😀👍🏽 and 👩‍👩‍👧", "\ufeffﬁ Ａ half", "a\u00a0b\u3000c", "(x) [y] {z} <w> ▁"),
    EXAMPLE_TEXT.read_text(encoding="utf-8")[:3000],
)
ADDED = {"<|user|>": True, "two words": False}


def own() -> bytes:
    return trained(user_defined_symbols="<sep>,[INST]", control_symbols="<ctl>")


def plain(directory: Path) -> None:
    """BOS and no EOS asked for, a chat template; ids behind the pieces are unused."""
    add_model(build(directory), trained(), add_bos_token=True, add_eos_token=False, chat_template="{{ messages }}")


def of_all_kinds(directory: Path) -> None:
    """Pieces of every type; three files add tokens, replace pieces, or name ids that the model does not have."""
    decoder = {
        "1": {"content": "<s>", "special": True},
        "4": {"content": "<sep>", "special": False},
        str(SIZE + 1): {"content": "<|im|>", "special": False},
        str(SIZE + 2): {"content": "two▁words", "special": False},
        str(SIZE + 3): {"content": "<x>", "special": True},
        str(VOCAB + 7): {"content": "far", "special": True},
    }
    add_model(build(directory), own(), added_tokens_decoder=decoder)
    edit_json(directory / "added_tokens.json", **{"more": SIZE + 5, "<|im|>": SIZE + 1, "far": VOCAB + 7})


def with_both_files(directory: Path) -> None:
    """What released checkpoints have: tokenizer.json says whether BOS is added, tokenizer.model has the pieces."""
    add_json(add_model(build(directory), trained()), trained(), add_bos_token=False)


def in_granite(directory: Path) -> None:
    add_model(build(directory, family="granite"), trained(), add_prefix_space=True)


def of_code_llama(directory: Path) -> None:
    """llama.cpp's converter has a rule for vocabularies of this size."""
    add_model(build(directory, vocab=32016), trained())


def without_prefix(directory: Path) -> None:
    add_model(build(directory), trained(add_dummy_prefix=False))


def only_json(directory: Path) -> None:
    add_json(build(directory, vocab=SIZE + len(ADDED)), trained(), ADDED)


def only_json_filled_up(directory: Path) -> None:
    add_json(build(directory), trained(), ADDED, add_eos_token=False)


SAME: dict[str, Callable[[Path], None]] = {
    **{"plain": plain, "of-all-kinds": of_all_kinds, "with-both-files": with_both_files, "in-granite": in_granite},
    "of-code-llama": of_code_llama,
}
"""Every byte is the script's."""
BETTER: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "without-prefix": (without_prefix, {"tokenizer.ggml.add_space_prefix"}),
    "only-json": (only_json, {"tokenizer.ggml.scores"}),
    "only-json-filled-up": (only_json_filled_up, {f"tokenizer.ggml.{k}" for k in ("tokens", "scores", "token_type")}),
}
"""The script's file makes other tokens than the model's own tokenizer or is not loaded: these keys are ours."""

SCRIPT = """
import json, runpy, sys
scripts, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [scripts + "/gguf-py", scripts]
for model in jobs:
    sys.argv = ["convert_hf_to_gguf.py", model, "--outtype", "bf16", "--outfile", model + ".gguf"]
    runpy.run_path(scripts + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every checkpoint and, beside it, llama.cpp's GGUF of it and ours."""
    folder = tmp_path_factory.mktemp("vocabularies")
    builders = {**SAME, **{name: make for name, (make, _) in BETTER.items()}}
    for name, make in builders.items():
        make(folder / name)
        write_gguf(open_source(folder / name, CONVERTERS), folder / f"{name}.ours.gguf")
    jobs = json.dumps([str(folder / name) for name in builders])
    command = [sys.executable, "-c", SCRIPT, str(require_runtime().convert), jobs]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.runtime
@pytest.mark.parametrize("name", SAME)
def test_same_file(converted: Path, name: str) -> None:
    ours, theirs = converted / f"{name}.ours.gguf", converted / f"{name}.gguf"
    mine, other = read_header(ours), read_header(theirs)
    assert list(mine.kvs) == list(other.kvs)
    assert mine.kvs == other.kvs
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.runtime
@pytest.mark.parametrize("name", BETTER)
def test_same_but_for(converted: Path, name: str) -> None:
    mine, other = (read_header(converted / f"{name}{end}.gguf").kvs for end in (".ours", ""))
    allowed = BETTER[name][1]
    assert {key for key in {**mine, **other} if mine.get(key) != other.get(key)} == allowed
    assert [key for key in mine if key not in allowed] == [key for key in other if key not in allowed]


@pytest.mark.runtime
@pytest.mark.parametrize("name", [name for name in (*SAME, *BETTER) if name != "of-all-kinds"])
def test_same_tokens(converted: Path, name: str) -> None:
    """llama.cpp makes of our file what SentencePiece makes of tokenizer.model, or transformers of tokenizer.json."""
    from transformers import AutoTokenizer

    from mopeq_edge.binding import LlamaModel

    model, directory = converted / name / "tokenizer.model", converted / name
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with LlamaModel(converted / f"{name}.ours.gguf") as llama:
        for text in TEXTS:
            found = llama.tokenize(text).tolist()
            if model.is_file():
                assert found == encoded(model.read_bytes(), text)
            assert found == tokenizer.encode(text, add_special_tokens=False)
        # a token for every byte: nothing is lost
        assert llama.detokenize(llama.tokenize("é😀\n")).removeprefix(" ") == "é😀\n"


@pytest.mark.runtime
@pytest.mark.parametrize("name", BETTER)
def test_the_script_alone_would_not_do(converted: Path, name: str) -> None:
    """Why our keys differ: without them llama.cpp does not load the file, or makes other tokens."""
    from mopeq_edge.binding import LlamaModel

    if name == "only-json-filled-up":
        with pytest.raises(MopeqError, match=r"token_embd\.weight' has wrong shape"):
            LlamaModel(converted / f"{name}.gguf")
        return
    with LlamaModel(converted / f"{name}.gguf") as theirs, LlamaModel(converted / f"{name}.ours.gguf") as ours:
        different = [theirs.tokenize(text).tolist() != ours.tokenize(text).tolist() for text in TEXTS]
    assert sum(different) >= 4


def written(directory: Path, pre: str | None = None, vocab: int = VOCAB) -> dict[str, Any]:
    writer = gguf.GGUFWriter(path=None, arch="llama")
    add_llama_vocabulary(writer, directory, vocab, pre)
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in writer.kv_data[0].items()}


def test_types_and_scores_of_a_model(tmp_path: Path) -> None:
    """Against the pieces that SentencePiece was told to make."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=own())
    found = written(add_model(tmp_path, own()))
    kind = gguf.TokenType
    assert (found["model"], found["pre"]) == ("llama", "default")
    assert found["tokens"][:8] == ["<unk>", "<s>", "</s>", "<ctl>", "<sep>", "[INST]", "<0x00>", "<0x01>"]
    expected = [kind.UNKNOWN, *3 * [kind.CONTROL], *2 * [kind.NORMAL], *256 * [kind.BYTE]]
    assert found["token_type"] == [*expected, *(SIZE - 262) * [kind.NORMAL], *(VOCAB - SIZE) * [kind.UNUSED]]
    assert found["scores"][:SIZE] == [processor.get_score(number) for number in range(SIZE)]
    assert found["tokens"][SIZE:] == [f"[PAD{number}]" for number in range(SIZE, VOCAB)]


def test_scores_from_merges_are_the_models(tmp_path: Path) -> None:
    """tokenizer.json has no scores, but its merges stand in the order of the pieces that SentencePiece learned."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    of_model = written(add_model(tmp_path / "a", trained()), vocab=SIZE)
    of_json = written(add_json(tmp_path / "b", trained()), vocab=SIZE)
    kinds = zip(of_model["tokens"], of_model["token_type"], strict=True)
    merged = [n for n, (text, kind) in enumerate(kinds) if kind == gguf.TokenType.NORMAL and len(text) > 1]
    assert len(merged) > 200
    assert [of_json["scores"][n] for n in merged] == [of_model["scores"][n] for n in merged]
    path = tmp_path / "b" / "tokenizer.json"
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    edit_json(path, model={**model, "merges": [" ".join(pair) for pair in model["merges"]]})
    assert written(tmp_path / "b", vocab=SIZE) == of_json


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "is of type unigram, expected BPE"),
        ({"model_type": "char"}, "is of type character, expected BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "replaces characters"),
        ({"remove_extra_whitespaces": True}, "removes repeated spaces"),
        ({"treat_whitespace_as_suffix": True}, "has spaces at the ends of words"),
        ({"byte_fallback": False}, "has 0 byte tokens, expected 256"),
    ],
)
def test_a_model_that_llama_cpp_cannot_follow(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    size = {"hard_vocab_limit": False, "vocab_size": 500}
    with pytest.raises(SourceError, match=message) as caught:
        written(add_model(tmp_path, trained(**size, **options)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.model"))


@pytest.mark.parametrize("damage", [b"", b"\x80", b"\x0a\xff\xff\xff\xff\x0f", b"not a model" * 9, None])
def test_a_damaged_model(tmp_path: Path, damage: bytes | None) -> None:
    add_model(tmp_path, trained()[:-200] if damage is None else damage)
    with pytest.raises(SourceError, match="is no SentencePiece model") as caught:
        written(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("added_tokens.json", {"a": -1}, "has token id '-1'"),
        ("added_tokens.json", {"a": "1"}, "has token id '1'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "has token id 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, "added token 1 has no text"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "its added_tokens_decoder is no object"),
    ],
)
def test_bad_added_tokens(tmp_path: Path, name: str, found: dict[str, Any], message: str) -> None:
    edit_json(add_model(tmp_path, trained()) / name, **found)
    with pytest.raises(SourceError, match=message):
        written(tmp_path)


def test_what_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    directory = add_model(tmp_path / "model", trained())
    with pytest.raises(SourceError, match="has no pre-tokenizer; leave out the name 'gpt-2'"):
        written(directory, pre="gpt-2")
    (tmp_path / "json").mkdir()
    directory = add_json(tmp_path / "json", trained())
    with pytest.raises(SourceError, match=r"has a token 799, but config.json has vocab_size 700"):
        written(directory, vocab=700)
    with pytest.raises(SourceError, match=r"of the SentencePiece kind \(byte_fallback\), expected a byte-level one"):
        add_bpe_vocabulary(gguf.GGUFWriter(path=None, arch="olmoe"), directory, SIZE, "gpt-2")
    (directory / "tokenizer.json").unlink()
    (directory / "tekken.json").write_text("{}")
    with pytest.raises(SourceError, match=r"its tokenizer is a tekken\.json"):
        written(directory)
