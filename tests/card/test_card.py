"""A card's YAML as PyYAML reads it, its numbers against the artifacts, its checksums against hashlib."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from mopeq_edge.artifacts import write_json
from mopeq_edge.card.text import markdown, yaml_lines
from mopeq_edge.cli import cli
from mopeq_edge.errors import FormatError, MopeqError, OutputError
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.split import part_paths, split_kvs

from ..builders import write_raw_gguf

HOSTILE = 'A "x"\n---\nlicense: mit\n| <script>*b*</script> [l](http://e.org) \u202e\udcff\x07 é 😀'
N_IN, N_OUT, N_EXPERT = 256, 4, 2
PLAN = "ab" * 32


def string(text: str) -> KV:
    return KV(ValueType.STRING, text)


def kvs(**more: KV) -> dict[str, KV]:
    found = {"general.architecture": string("olmoe"), "olmoe.expert_count": KV(ValueType.UINT32, N_EXPERT)}
    return {**found, "mopeq.version": string("0.1.0"), "mopeq.plan.sha256": string(PLAN), **more}


def tensors(types: dict[str, str]) -> list[tuple[str, tuple[int, ...], Any, bytes]]:
    made = []
    for name, kind in types.items():
        shape = (N_IN, N_OUT, N_EXPERT) if "exps" in name else (N_IN, N_OUT)
        size = BY_NAME[kind].nbytes(N_IN * N_OUT * (N_EXPERT if "exps" in name else 1))
        made.append((name, shape, BY_NAME[kind], bytes(size)))
    return made


STOCK = {"token_embd.weight": "Q8_0", "blk.0.ffn_up_exps.weight": "Q4_K", "blk.0.ffn_down_exps.weight": "Q2_K"}


def model(path: Path, **more: KV) -> Path:
    write_raw_gguf(path, kvs(**more), tensors(STOCK))
    return path


def card(*args: object) -> Result:
    return CliRunner().invoke(cli, ["card", *map(str, args)])


def metadata(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, (done.output, done.exception)
    _, head, _ = done.stdout.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def rows(done: Result) -> list[list[str]]:
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_numbers_and_checksums(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf")
    size = path.stat().st_size
    evaluation = {"kld_mean_nats": 0.012345, "kld_p99_9_nats": 0.5, "same_top_fraction": 0.9, "positions_count": 7}
    body = {"plan_sha256": PLAN, "file_bytes": size, "evaluation": evaluation}
    write_json(tmp_path / "m.mopeq" / "validation.json", "mopeq-edge validation", 1, body)
    done = card(path)
    # by hand: a block of 256 has 144 bytes in Q4_K and 84 in Q2_K, one of 32 has 34 in Q8_0
    experts, embedding = N_OUT * N_EXPERT * (144 + 84), N_OUT * 8 * 34
    expert_weights, weights = 2 * N_IN * N_OUT * N_EXPERT, N_IN * N_OUT * (1 + 2 * N_EXPERT)
    _, row = rows(done)
    assert row[:3] == ["m.gguf", "stock", f"{size:,}"]
    assert float(row[3]) == pytest.approx(size / 1e9, rel=1e-3)
    assert float(row[4]) == pytest.approx(size / 2**30, rel=1e-3)
    assert float(row[5]) == pytest.approx(8 * (experts + embedding) / weights, abs=5.1e-4)
    assert float(row[6]) == pytest.approx(8 * experts / expert_weights, abs=5.1e-4)
    assert [float(cell) for cell in row[7:]] == pytest.approx([0.012345, 0.5, 0.9], abs=5.1e-6)
    assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  m.gguf\n" in done.stdout
    # another file's measurement is not this one's
    write_json(tmp_path / "m.mopeq" / "validation.json", "mopeq-edge validation", 1, {**body, "file_bytes": size + 1})
    assert "KLD" not in card(path).stdout


def test_licence_and_base_model_are_carried_over_or_left_out(tmp_path: Path) -> None:
    bare = model(tmp_path / "bare.gguf")
    done = card(bare)
    found = metadata(done)
    assert not {"license", "base_model", "base_model_relation", "language", "quantized_by"} & set(found)
    assert (found["library_name"], found["pipeline_tag"]) == ("gguf", "text-generation")
    assert found["tags"] == ["gguf", "moe", "quantized", "mopeq-edge"]
    assert "no licence" in done.stderr
    source = tmp_path / "source"
    source.mkdir()
    readme = "---\nlicense: other\nlicense_name: own\nlicense_link: L\nlanguage: [en, no]\nbase_model: a/b\n---\nText"
    (source / "README.md").write_text(readme)
    found = metadata(card(bare, "--source", source))
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "own", "L")
    assert (found["language"], found["base_model"], found["base_model_relation"]) == (
        ["en", "no"],
        ["a/b"],
        "quantized",
    )
    assert metadata(card(bare, "--source", source, "--base-model", "c/d"))["base_model"] == ["c/d"]
    base = {"general.base_model.count": KV(ValueType.UINT32, 1), "general.license": string("apache-2.0")}
    base["general.base_model.0.repo_url"] = string("https://huggingface.co/allenai/OLMoE")
    found = metadata(card(model(tmp_path / "full.gguf", **base), "--source", source))
    assert (found["license"], found["base_model"]) == ("apache-2.0", ["allenai/OLMoE"])
    # the name of the source's licence does not belong to the file's
    assert "license_name" not in found
    (source / "README.md").write_text("---\na: [\n---\n")
    assert isinstance(card(bare, "--source", source).exception, FormatError)
    assert isinstance(card(bare, "--base-model", "x\ny").exception, MopeqError)


def test_strings_of_strangers(tmp_path: Path) -> None:
    more = {"general.license": string(HOSTILE), "general.name": string(HOSTILE)}
    imatrix = {"quantize.imatrix.dataset": string(f"/home/me/{HOSTILE}")}
    done = card(model(tmp_path / "m|[x](y).gguf", **more, **imatrix))
    found = metadata(done)
    assert found["license"] == 'A "x" --- license: mit | <script>*b*</script> [l](http://e.org) é 😀'
    assert done.stdout.splitlines().count("---") == 2
    body = done.stdout.split("---\n", 2)[2].partition("```")[0]
    assert "<script>" not in body.replace("\\<", "")
    assert "# A " in body
    assert "\\[l\\]\\(http\\:" in body
    assert "m\\|\\[x\\]\\(y\\).gguf" in body
    assert "/home/me" not in done.stdout
    assert yaml.safe_load("\n".join(yaml_lines("k", HOSTILE)))["k"] == found["license"]
    assert markdown("a|b\n_c_") == "a\\|b \\_c\\_"


def test_what_sees_pictures_beside_it(tmp_path: Path) -> None:
    file = model(tmp_path / "out.gguf")
    eyes = tmp_path / "mmproj-out.gguf"
    write_raw_gguf(eyes, {"general.type": string("mmproj")}, [])
    done = card(file)
    assert metadata(done)["pipeline_tag"] == "image-text-to-text"
    assert "mopeq-edge run out.gguf --image photo.jpg" in done.stdout
    assert f"{hashlib.sha256(eyes.read_bytes()).hexdigest()}  mmproj-out.gguf" in done.stdout


def test_per_expert_and_split(tmp_path: Path) -> None:
    grouped = tmp_path / "g.gguf"
    stack = "blk.0.ffn_up_exps"
    row = (N_IN, N_OUT, 1)
    groups = [
        (f"{stack}.{g}.weight", row, BY_NAME[k], bytes(BY_NAME[k].nbytes(N_IN * N_OUT)))
        for g, k in enumerate(("Q2_K", "Q4_K"))
    ]
    ids = b"".join(i.to_bytes(4, "little", signed=True) for i in (0, -1, -1, 0))
    version = {"mopeq.expert_groups.version": KV(ValueType.UINT32, 1)}
    write_raw_gguf(grouped, kvs(**version), [*groups, (f"{stack}.map", (2, 2), BY_NAME["I32"], ids)])
    parts = part_paths(tmp_path / "s.gguf", 2)
    whole = tensors(STOCK)
    for number, (part, some) in enumerate(zip(parts, (whole[:1], whole[1:]), strict=True)):
        write_raw_gguf(part, {**(kvs() if not number else {}), **split_kvs(number, 2, 3)}, some)
    done = card(parts[0], grouped)
    assert "per-expert" in metadata(done)["tags"]
    assert "do not load g.gguf**" in done.stdout
    assert "mopeq-edge run g.gguf" in done.stdout
    _, first, second = rows(done)
    assert first[:3] == [parts[0].name, "stock", f"{sum(p.stat().st_size for p in parts):,}"]
    assert second[:2] == ["g.gguf", "per-expert"]
    for path in (*parts, grouped):
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" in done.stdout


def test_the_card_is_written_whole_and_replaces_nothing_unasked(tmp_path: Path) -> None:
    path, out = model(tmp_path / "m.gguf"), tmp_path / "README.md"
    printed = card(path).stdout
    done = card(path, "-o", out, "--json")
    assert out.read_text() == printed
    assert json.loads(done.stdout)["files"][0]["file_bytes"] == path.stat().st_size
    out.write_text("mine")
    assert isinstance(card(path, "-o", out).exception, OutputError)
    assert isinstance(card(path, "-o", path, "--force").exception, OutputError)
    assert isinstance(card(path, "-o", out, "--force", "--source", tmp_path).exception, OutputError)
    assert out.read_text() == "mine"
    assert card(path, "-o", out, "--force").exit_code == 0
    assert out.read_text() == printed


def test_files_of_two_models_are_refused(tmp_path: Path) -> None:
    other = model(tmp_path / "b.gguf", **{"olmoe.expert_count": KV(ValueType.UINT32, 9)})
    assert isinstance(card(model(tmp_path / "a.gguf"), other).exception, MopeqError)


def test_what_sees_pictures_is_listed(tmp_path: Path) -> None:
    out = model(tmp_path / "m.gguf")
    for name, content in (("m.vision.onnx", b"graph"), ("m.vision.onnx.data", b"weights")):
        (tmp_path / name).write_bytes(content)
    text = card(out).stdout
    assert "With pictures, from m.vision.onnx (5 bytes), m.vision.onnx.data (7 bytes) in the same directory:" in text
    assert "mopeq-edge run m.gguf --image photo.jpg -p" in text
    assert "give the first" not in text
    for name in ("m.gguf", "m.vision.onnx", "m.vision.onnx.data"):
        assert f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}" in text
    (tmp_path / "m.vision.onnx.data").unlink()
    refused = card(out)
    assert "its weights, m.vision.onnx.data, are not beside it" in str(refused.exception)
