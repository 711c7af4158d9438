"""Models that llama.cpp sees with: ``convert`` writes the mmproj, ``run`` and ``serve`` use it, and what llama.cpp
computes from a picture and a prompt is what transformers computes.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from converters import CONVERTERS
from converters.mmproj import has_mmproj, known_architectures, write_mmproj
from mopeq_edge.cli import cli
from mopeq_edge.cli.image import mmproj_for, one_answer
from mopeq_edge.errors import MopeqError, OutputError, PlanError, SourceError
from mopeq_edge.expert_groups.layout import ExpertGroup, Types
from mopeq_edge.ggml.types import BY_NAME, F32
from mopeq_edge.gguf_file import KV, ValueType, read_header
from mopeq_edge.pipeline import Context, open_context
from mopeq_edge.pipeline_vision import check_vision, run_vision
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime.locate import require_runtime
from mopeq_edge.runtime.server import Server, ServerError, serving
from mopeq_edge.source.checkpoint import read_config
from mopeq_edge.source.open import open_source
from mopeq_edge.source.roles import Role
from mopeq_edge.vision.mmproj import mmproj_beside

from ..builders import EXAMPLE_TEXT, write_gguf, write_quantized_gguf, write_raw_gguf
from ..commands import run_json
from ..converters.families import VOCAB, qwen3_vl_moe_model
from .pictures import picture
from .qwen3_vl import STEP, TOKENS, build_seeing
from .test_odd_pictures import ODD, OTHER, REFUSED, SEEN, fails_in_one_line, files_of, saved

CODE = "import sys; sys.argv[0] = 'mopeq-edge'; from mopeq_edge.cli import main; main()"
PROMPT = "user: {}What is this?\nassistant:"
EXACT = ("-t", "1", "-c", "256", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-repack")
SIZES = ((3, 3), (6, 2), (2, 5))
"""Columns and rows of tokens: square, wide, tall. Pictures of these sizes are not scaled."""

Rows = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Made:
    directory: Path
    gguf: Path
    """In F32, as the mmproj beside it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("qwen3-vl-moe")
    directory = build_seeing(folder / "model", "float32")
    write_gguf(open_source(directory, CONVERTERS, pre="gpt-2"), folder / "out.gguf")
    write_mmproj(directory, mmproj_beside(folder / "out.gguf"), "F32", "1" * 64)
    return Made(directory, folder / "out.gguf")


@pytest.fixture(scope="module")
def server(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``mopeq-edge serve``, which finds the mmproj by itself."""
    with serve(made.gguf, tmp_path_factory.mktemp("log")) as found:
        yield found


def serve(gguf: Path, folder: Path) -> Any:
    return serving(
        Path(sys.executable), ["-c", CODE, "serve", str(gguf), *EXACT, "-np", "1", "--cache-ram", "0"], folder / "log"
    )


def png(columns: int, rows: int) -> bytes:
    file = io.BytesIO()
    picture(columns * STEP, rows * STEP, seed=columns).save(file, "PNG")
    return file.getvalue()


def log_probabilities(server: Server, image: bytes | None, n: int = 1) -> tuple[list[int], Rows]:
    """Greedy tokens, and the log-probabilities of every token in the place of the first, by llama.cpp."""
    with urllib.request.urlopen(f"{server.url}/props") as reply:
        marker = json.loads(reply.read())["media_marker"]
    text = PROMPT.format("" if image is None else marker)
    prompt: Any = {"prompt_string": text, "multimodal_data": [base64.b64encode(image).decode()]} if image else text
    wanted = {"n_probs": VOCAB, "cache_prompt": False, "return_tokens": True}
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, **wanted}
    answer = server.post("/completion", body)
    found = np.full(VOCAB, np.nan)
    for entry in answer["completion_probabilities"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return answer["tokens"], found


def of_transformers(directory: Path, image: bytes, n: int) -> tuple[list[int], Rows]:
    """The same by transformers' whole model, the picture through its own processor."""
    import torch
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = qwen3_vl_moe_model(directory)
    processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
    pixels = processor(images=[Image.open(io.BytesIO(image)).convert("RGB")], return_tensors="pt")
    _, height, width = pixels["image_grid_thw"][0].tolist()
    pad, _, start, end = TOKENS
    text = PROMPT.format(start + pad * (height * width // 4) + end)
    ids = AutoTokenizer.from_pretrained(directory).encode(text, add_special_tokens=False)
    first, tokens = np.empty(0), []
    for _ in range(n):
        given = torch.tensor([ids + tokens])
        kinds = (given == VOCAB - len(TOKENS)).long()
        with torch.no_grad():
            logits = model(
                input_ids=given, attention_mask=torch.ones_like(given), mm_token_type_ids=kinds, **pixels
            ).logits[0, -1]
        found = torch.log_softmax(logits.double(), -1).numpy()
        first = first if tokens else found
        tokens.append(int(found.argmax()))
    return tokens, first


@pytest.mark.runtime
@pytest.mark.parametrize("size", SIZES)
def test_llama_cpp_computes_what_transformers_does(size: tuple[int, int], made: Made, server: Server) -> None:
    """Not to the last digit: llama.cpp's GELU is a table of 16 bit."""
    image = png(*size)
    tokens, got = log_probabilities(server, image, n=4)
    wanted, expected = of_transformers(made.directory, image, n=4)
    assert expected.std() > 0.5
    assert np.abs(got - expected).max() < 4e-3 * expected.std()
    assert tokens == wanted
    # without the picture it is far from that
    _, blind = log_probabilities(server, None)
    assert np.abs(blind - expected).max() > 0.5 * expected.std()


@pytest.mark.runtime
def test_run_with_a_picture_answers_as_the_server(made: Made, server: Server, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(png(3, 3))
    url = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 6}
    expected = server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    given = ["--image", str(photo), "-p", "What is this?", "-n", "6", "--temp", "0", *EXACT]
    command = [sys.executable, "-c", CODE, "run", str(made.gguf), *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert expected.strip()
    assert expected.strip() in done.stdout


@pytest.mark.runtime
@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_seen_as_a_person_sees_them(name: str, server: Server, tmp_path: Path) -> None:
    """By llama-server: every log-probability is that of the plain picture, to the last bit."""
    odd, plain = files_of(name, tmp_path)
    (got, found), (wanted, expected) = (log_probabilities(server, path.read_bytes(), n=4) for path in (odd, plain))
    np.testing.assert_array_equal(found, expected)
    assert got == wanted


@pytest.mark.runtime
def test_two_pictures_differ(server: Server) -> None:
    """Without this the test above would say little."""
    first, second = (log_probabilities(server, saved(image, "PNG"))[1] for image in (SEEN, OTHER))
    assert np.abs(first - second).max() > 0.01


@pytest.mark.runtime
def test_run_sees_an_odd_picture_as_the_plain_one(made: Made, tmp_path: Path) -> None:
    """Also two in one argument, as llama-cli takes them."""
    turned, plain = files_of("turned-6.png", tmp_path)
    cmyk = tmp_path / "a,b.jpg"
    cmyk.write_bytes(ODD["cmyk.jpg"]()[0])
    Image.fromarray(ODD["cmyk.jpg"]()[1]).save(tmp_path / "cmyk.png")
    answers = []
    for images in ((turned, cmyk), (f"{plain},{tmp_path / 'cmyk.png'}",)):
        pictures = [arg for image in images for arg in ("--image", str(image))]
        given = [*pictures, "-p", "What is this?", "-n", "8", "--temp", "0", "-t", "1", "-c", "1024"]
        command = [sys.executable, "-c", CODE, "run", str(made.gguf), *given]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, timeout=99, stdin=subprocess.DEVNULL
        )
        answers.append(done.stdout.split("What is this?")[-1].split("[ Prompt")[0])
    assert answers[0].strip()
    assert answers[0] == answers[1]


@pytest.mark.runtime
@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"thin.png"}))
def test_what_is_no_picture_reaches_no_model(
    name: str,
    made: Made,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content, message = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert message in fails_in_one_line(path, monkeypatch, capsys, "run", made.gguf, "--image", path, "-p", "What?")
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    with pytest.raises(ServerError, match="status 400") as refused:
        server.post("/v1/chat/completions", body)
    assert message.partition(",")[0] in str(refused.value)
    assert "messages[0].content[0].image_url" in str(refused.value)


@pytest.mark.runtime
def test_experts_in_groups_see_too(made: Made, tmp_path: Path) -> None:
    """Stacks in groups of one type: the same numbers as without groups, bit for bit."""
    source = open_source(made.directory, CONVERTERS, pre="gpt-2")
    groups = (ExpertGroup(F32, (0, 2, 4, 6)), ExpertGroup(F32, (1, 3, 5, 7)))
    grouped: Types = {tensor.name: groups for tensor in source.tensors if tensor.role is Role.EXPERT}
    found = []
    for name, types in (("stock", {}), ("groups", grouped)):
        gguf = tmp_path / name / "out.gguf"
        gguf.parent.mkdir()
        write_quantized_gguf(source, types, gguf)
        shutil.copy(mmproj_beside(made.gguf), mmproj_beside(gguf))
        with serve(gguf, gguf.parent) as own:
            found.append(log_probabilities(own, png(3, 3))[1])
    assert np.array_equal(*found)


@pytest.mark.runtime
def test_convert_writes_it_and_keeps_it(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    work = ["--work-dir", tmp_path / "work", "--text", EXAMPLE_TEXT, "--chunks", 2, "--window", 64, "--threads", 1]
    found = run_json(
        *("convert", made.directory, out, "--target-bpw", 9, *work, "--no-evaluate", "--no-fisher"),
        *("--types", "Q8_0", "--json"),
    )
    mmproj = tmp_path / "mmproj-out.gguf"
    assert mmproj_beside(out) == mmproj
    size = mmproj.stat().st_size
    assert found["vision"] == {
        **{"file_bytes": size, "files": {mmproj.name: size}, "output": mmproj.name},
        **{"relative_error": None, "type": "F16"},
    }
    # known before it was written, and a part of what the device loads
    assert found["device_bytes"] == out.stat().st_size + size
    types = {tensor.name: tensor.type.name for tensor in read_header(mmproj).tensors}
    assert types["v.blk.0.attn_qkv.weight"] == "F16"
    assert CliRunner().invoke(cli, ["verify", str(mmproj)]).exit_code == 0
    raw = bytearray(mmproj.read_bytes())
    raw[-40] ^= 1
    (tmp_path / "damaged.gguf").write_bytes(raw)
    assert CliRunner().invoke(cli, ["verify", str(tmp_path / "damaged.gguf")]).exit_code == 1
    # the same again is kept, another type needs --force
    before = mmproj.stat().st_mtime_ns
    context = opened(made.directory, tmp_path / "work")
    request = check_vision(context, out, "F16", force=False)
    kept = run_vision(context, request)
    assert kept is not None
    assert (kept.path, kept.file_bytes, mmproj.stat().st_mtime_ns) == (mmproj, size, before)
    with pytest.raises(OutputError, match=r"mmproj-out.gguf: exists already; choose another name or give --force"):
        check_vision(context, out, "Q8_0", force=False)
    with pytest.raises(PlanError, match="--vision-type INT8: what sees pictures here can be F16, F32, BF16, Q8_0"):
        check_vision(context, out, "INT8", force=True)
    assert check_vision(context, out, None, force=False) is None


@pytest.mark.runtime
def test_what_the_script_cannot_make_stops_before_the_work(made: Made, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made.directory, tmp_path / "model"))
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match=r"'image_mean'; --text-only leaves out what sees pictures$"):
        check_vision(opened(directory, tmp_path / "work"), tmp_path / "out.gguf", "F16", force=False)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".gguf"] == []


def opened(directory: Path, work: Path) -> Context:
    return open_context(directory, work, pre=None, threads=1, progress=SilentProgress())


@pytest.mark.runtime
def test_which_models_have_one(made: Made) -> None:
    config = read_config(made.directory)
    assert has_mmproj(config)
    assert not has_mmproj({**config, "architectures": ["OlmoeForCausalLM"]})
    assert not has_mmproj({"architectures": config["architectures"]})
    # of a part that sees with an architecture of its own, that one counts
    assert not has_mmproj({**config, "vision_config": {"architectures": ["UnknownModel"]}})
    assert "Glm4vMoeForConditionalGeneration" in known_architectures(require_runtime().convert)


def mmproj_file(path: Path) -> Path:
    kvs = {"general.architecture": KV(ValueType.STRING, "clip"), "general.type": KV(ValueType.STRING, "mmproj")}
    kvs["clip.projector_type"] = KV(ValueType.STRING, "qwen3vl_merger")
    patches = ("v.patch_embd.weight", (2, 2, 3, 4), F32, np.ones(48, np.float32).tobytes())
    merger = ("mm.0.weight", (32, 4), BY_NAME["F16"], np.ones(128, np.float16).tobytes())
    write_raw_gguf(path, kvs, [patches, merger])
    return path


def test_it_is_no_model(tmp_path: Path) -> None:
    """Every command says what it is."""
    mmproj = mmproj_file(tmp_path / "mmproj-out.gguf")

    def call(*args: object) -> Result:
        return CliRunner().invoke(cli, [str(arg) for arg in args])

    shown = call("inspect", mmproj)
    assert shown.exit_code == 0
    assert "no model but what sees pictures for one (mmproj, qwen3vl_merger), 2 tensors" in shown.output
    assert json.loads(call("inspect", mmproj, "--json").stdout)["projector"] == "qwen3vl_merger"
    valid = call("validate", mmproj, "--json")
    assert valid.exit_code == 0
    assert json.loads(valid.stdout)["passed"]
    for args, words in (
        (("convert", mmproj, tmp_path / "x.gguf", "--target-bpw", 4), "give the model's own file"),
        (("memory", mmproj), "give the model, and this with --mmproj"),
        (("card", mmproj), "give the model that it is for"),
    ):
        refused = call(*args)
        assert isinstance(refused.exception, MopeqError), args
        assert str(refused.exception).startswith(f"{mmproj}: is no model but what sees pictures for one")
        assert words in str(refused.exception)


def test_whose_eyes(tmp_path: Path) -> None:
    gguf = tmp_path / "out-00001-of-00002.gguf"
    assert mmproj_for(gguf, ["--image", "a.png"]) is None
    mmproj = mmproj_file(tmp_path / "mmproj-out.gguf")
    assert mmproj_for(gguf, ["--image", "a.png"]) == mmproj
    assert mmproj_for(gguf, ["--image", "a.png", "--vision=x.onnx"]) is None
    (tmp_path / "out.vision.onnx").touch()
    assert mmproj_for(gguf, ["--image", "a.png"]) is None
    assert one_answer(["--image", "a.png", "-p", "x"]) == one_answer(["--prompt=x"]) == ["--single-turn"]
    assert one_answer(["--image", "a.png"]) == one_answer(["-cnv", "-p", "x"]) == []
