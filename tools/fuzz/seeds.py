"""Small files of every kind that is fuzzed, made anew on each call. ``python -m tools.fuzz.seeds`` writes tests/corpus,
which fuzzers start from.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mopeq_edge.array_file import write_arrays
from mopeq_edge.calibrate.statistics import Routing, write_routing
from mopeq_edge.expert_groups.layout import VERSION_KEY
from mopeq_edge.ggml.types import BY_NAME, F32, I32
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import TensorSpec, layout, string, uint32
from mopeq_edge.imatrix import Entry, Imatrix, write_imatrix
from mopeq_edge.plan.artifact import Plan, PlannedGroup, PlannedTensor, PrecisionMap, write_plan
from mopeq_edge.sensitivity import table
from mopeq_edge.source.padded import ExpertPadding
from mopeq_edge.vision.description import KEY, STAMP, TILES, Description, Prompt, Tiles, weights_file

HIDDEN, FF, N_EXPERT, VOCAB, N_HEAD = 32, 32, 4, 300, 2

_DENSE: Mapping[str, tuple[int, ...]] = {
    "attn_norm": (HIDDEN,),
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (HIDDEN, HIDDEN)),
    **{"attn_q_norm": (HIDDEN,), "attn_k_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)},
    "ffn_gate_inp": (HIDDEN, N_EXPERT),
}


def model_kvs() -> dict[str, KV]:
    """Of an OLMoE of one layer."""
    numbers = {
        **{"block_count": 1, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": FF},
        **{"attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD},
        **{"expert_count": N_EXPERT, "expert_used_count": 2},
    }
    tokens = [chr(97 + n % 26) * (1 + n // 26) for n in range(40)]
    return {
        "general.architecture": string("olmoe"),
        "general.alignment": uint32(32),
        **{f"olmoe.{key}": uint32(value) for key, value in numbers.items()},
        "olmoe.attention.layer_norm_rms_epsilon": KV(ValueType.FLOAT32, 1e-5),
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.tokens": KV(ValueType.ARRAY, tokens, ValueType.STRING),
        "tokenizer.ggml.token_type": KV(ValueType.ARRAY, [1] * 40, ValueType.INT32),
        "tokenizer.ggml.merges": KV(ValueType.ARRAY, ["a a", "b b"], ValueType.STRING),
        "tokenizer.chat_template": string("{{ messages }}"),
    }


def model_specs(kind: str, *, grouped: bool = False) -> list[TensorSpec]:
    """Tensors of that model; with ``grouped`` the stack of up matrices is in two groups."""
    own = BY_NAME[kind]
    found: list[TensorSpec] = [("token_embd.weight", (HIDDEN, 40), own), ("output.weight", (HIDDEN, 40), own)]
    found.append(("output_norm.weight", (HIDDEN,), F32))
    found += [
        (f"blk.0.{name}.weight", shape, F32 if "norm" in name or "inp" in name else own)
        for name, shape in _DENSE.items()
    ]
    found += [(f"blk.0.ffn_{name}_exps.weight", (HIDDEN, FF, N_EXPERT), own) for name in ("gate", "down")]
    if not grouped:
        return [*found, ("blk.0.ffn_up_exps.weight", (HIDDEN, FF, N_EXPERT), own)]
    return [
        *found,
        ("blk.0.ffn_up_exps.0.weight", (HIDDEN, FF, 1), own),
        ("blk.0.ffn_up_exps.1.weight", (HIDDEN, FF, 3), BY_NAME["Q8_0"]),
        ("blk.0.ffn_up_exps.map", (2, N_EXPERT), I32),
    ]


def gguf_bytes(kvs: Mapping[str, KV], specs: list[TensorSpec], data: Mapping[str, bytes] | None = None) -> bytes:
    """A whole file, zeros where ``data`` has nothing for a tensor."""
    place = layout(kvs, specs)
    file = bytearray(place.file_size)
    file[: len(place.header)] = place.header
    for info in place.tensors:
        raw = (data or {}).get(info.name, b"")
        file[len(place.header) + info.offset :][: len(raw)] = raw
        start = len(place.header) + info.offset
        file[start : start + len(raw)] = raw
    return bytes(file)


def gguf_seeds() -> dict[str, bytes]:
    rows = np.array([[0, -1], [-1, 0], [-1, 1], [-1, 2]], dtype="<i4").tobytes()
    grouped = {**model_kvs(), VERSION_KEY: uint32(1)}
    every: dict[str, KV] = {
        f"k{kind}": KV(ValueType(kind), "text" if kind == 8 else kind < 7 or 1) for kind in range(13) if kind != 9
    }
    arrays = {
        f"a{kind}": KV(ValueType.ARRAY, ["a", ""] if kind == 8 else [1, 0], ValueType(kind))
        for kind in range(13)
        if kind != 9
    }
    return {
        "plain": gguf_bytes(model_kvs(), model_specs("Q4_0")),
        "f32": gguf_bytes({"general.architecture": string("llama")}, [("a", (2, 2, 2, 1), F32), ("b", (1,), F32)]),
        "grouped": gguf_bytes(grouped, model_specs("Q4_0", grouped=True), {"blk.0.ffn_up_exps.map": rows}),
        "types": gguf_bytes({**every, **arrays}, []),
    }


def imatrix() -> Imatrix:
    entries = {
        "blk.0.ffn_up_exps.weight": Entry(np.ones((3, 4), np.float32), np.array([2, 1, 5], np.float32)),
        "blk.0.attn_q.weight": Entry(np.full((1, 4), 0.5, np.float32), np.array([8], np.float32)),
    }
    return Imatrix(entries, ("text",), 2, 4, unrouted=("blk.0.ffn_up_exps.weight[1]",))


def plan() -> Plan:
    """A plan with a whole tensor and one in groups."""
    groups = (PlannedGroup("Q4_0", "0,2", 1152), PlannedGroup("Q8_0", "1,3", 2176))
    stack = PlannedTensor("blk.0.ffn_up_exps.weight", "expert", (HIDDEN, FF, 4), "mixed", 3360, 0.5, groups)
    whole = PlannedTensor("output.weight", "output", (HIDDEN, 40), "Q8_0", 1376, 0.25)
    return Plan(
        **{"layout": "per-expert", "planner": "mopeq", "sensitivity": "mopeq", "unit": "1", "budget_bytes": 10_000},
        **{"file_bytes": 5000, "header_bytes": 264, "smallest_bytes": 4000, "largest_bytes": 9000, "damage": 0.75},
        **{"gap": None, "quantized_with": "activation", "types": ("Q4_0", "Q8_0"), "made_from": "x"},
        tensors=(whole, stack),
        n_weights=5376,
        precision_map=PrecisionMap("layer", ("Q4_0", "Q8_0"), (2, 2), 4900, -1),
        expert_padding=ExpertPadding("olmoe.feed_forward_length", 32, 64),
    )


CONFIG: Mapping[str, Any] = {
    **{"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": HIDDEN, "vocab_size": VOCAB},
    **{"intermediate_size": FF, "num_hidden_layers": 1, "num_attention_heads": N_HEAD, "num_key_value_heads": N_HEAD},
    **{"num_experts": N_EXPERT, "num_experts_per_tok": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
    **{"rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False, "hidden_act": "silu"},
}


def checkpoint_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of the checkpoint that :data:`CONFIG` describes, outermost axis first."""
    layer = {
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "self_attn.q_norm"), (HIDDEN,)),
        "self_attn.k_norm": (HIDDEN,),
        **dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), (HIDDEN, HIDDEN)),
        "mlp.gate": (N_EXPERT, HIDDEN),
    }
    for expert in range(N_EXPERT):
        layer |= {f"mlp.experts.{expert}.{name}_proj": (FF, HIDDEN) for name in ("gate", "up")}
        layer[f"mlp.experts.{expert}.down_proj"] = (HIDDEN, FF)
    return {
        **dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCAB, HIDDEN)),
        "model.norm.weight": (HIDDEN,),
        **{f"model.layers.0.{name}.weight": shape for name, shape in layer.items()},
    }


def safetensors_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", width: int = 2) -> bytes:
    header, at = {}, 0
    for name, shape in shapes.items():
        nbytes = int(np.prod(shape)) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def torch_bytes() -> bytes:
    import torch

    file = io.BytesIO()
    torch.save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, file)
    return file.getvalue()


def tokenizer_json() -> dict[str, Any]:
    """A byte-level tokenizer of 257 tokens and one merge."""
    # GPT-2's letters for bytes: printable ones are themselves, the others follow from 256 on
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(n) for n in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        **{"version": "1.0", "truncation": None, "padding": None, "normalizer": None},
        "added_tokens": [
            {"id": 257, "content": "<|end|>", "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        ],
        **{"pre_tokenizer": level, "post_processor": level, "decoder": level},
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False},
            "vocab": {**{letter: n for n, letter in enumerate(letters)}, "aa": 256},
            "merges": ["a a"],
        },
    }


TOKENIZER_CONFIG: Mapping[str, Any] = {
    **{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": "{{ messages }}"},
    "added_tokens_decoder": {"257": {"content": "<|end|>", "special": True}},
}


VISION_SIDE, VISION_ROWS, VISION_WIDTH = 4, 2, 8
_VISION_NAME = "out.vision.onnx"


def vision_graph(name: str = _VISION_NAME) -> Any:
    """The graph (ModelProto) of a tower of one matrix, which lies in the file beside ``name``; no metadata."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    n_in = 3 * VISION_SIDE**2 // VISION_ROWS**2
    matrix = onnx.TensorProto(name="matrix", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    matrix.dims.extend((n_in, VISION_WIDTH))
    for key, value in (("location", f"{name}.data"), ("offset", "4096"), ("length", str(4 * n_in * VISION_WIDTH))):
        matrix.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    vectors = [numpy_helper.from_array(np.ones(VISION_WIDTH, np.float32), key) for key in ("newline", "separator")]
    vectors.append(numpy_helper.from_array(np.array([VISION_ROWS**2, n_in], np.int64), "shape"))
    nodes = [
        helper.make_node("Reshape", ["pixels", "shape"], ["patches"]),
        helper.make_node("MatMul", ["patches", "matrix"], ["embeddings"]),
        helper.make_node("Identity", ["newline"], ["image_newline"]),
        helper.make_node("Identity", ["separator"], ["view_seperator"]),
    ]
    info = helper.make_tensor_value_info
    outputs = [info("embeddings", TensorProto.FLOAT, [VISION_ROWS**2, VISION_WIDTH])]
    outputs += [info(key, TensorProto.FLOAT, [VISION_WIDTH]) for key in ("image_newline", "view_seperator")]
    inputs = [info("pixels", TensorProto.FLOAT, [1, 3, VISION_SIDE, VISION_SIDE])]
    graph = helper.make_graph(nodes, "tower", inputs, outputs, [*vectors, matrix])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="mopeq")


def vision_weights() -> bytes:
    """The file beside :func:`vision_graph`."""
    values = np.arange(3 * VISION_SIDE**2 // VISION_ROWS**2 * VISION_WIDTH, dtype="<f4")
    return bytes(4096) + values.tobytes() + b"a" * STAMP


def vision_description() -> Description:
    """What :func:`vision_graph` says of itself."""
    half = (0.5, 0.5, 0.5)
    return Description(
        **{"kind": TILES, "n_embd": VISION_WIDTH, "weights_type": "F32", "weights_bytes": len(vision_weights())},
        **{"relative_error": 0.0, "made_from": "a" * STAMP},
        layout=Tiles(VISION_SIDE, VISION_ROWS, ((4, 4), (8, 4)), 2, True, half, half),
        prompt=Prompt("<|User|>: ", "<|Assistant|>:", "<image>", "<image>\n"),
    )


def write_vision_files(path: Path) -> Path:
    """A whole vision file, ``path`` and the file beside, with its description and hashes."""
    import onnx

    from mopeq_edge.vision import hashes
    from mopeq_edge.vision.graph_file import read_graph

    beside, model = weights_file(path), vision_graph(path.name)
    beside.write_bytes(vision_weights())
    path.write_bytes(model.SerializeToString(deterministic=True))
    said = hashes.unsealed(hashes.tensor_hashes(beside, read_graph(path).stored))
    onnx.helper.set_model_props(model, {KEY: vision_description().text(), hashes.KEY: said})
    path.write_bytes(hashes.sealed(model.SerializeToString(deterministic=True)))
    return path


def vision_seeds() -> dict[str, bytes]:
    """Descriptions of both kinds, which are JSON, and a whole graph."""
    tiles = json.loads(vision_description().text())
    crops = {**tiles, "kind": "crops"}
    crops["layout"] = {"side": 24, "patch": 2, "most": 12, "margins": [4, 4], "mean": [0.1] * 3, "std": [0.5] * 3}
    with TemporaryDirectory() as folder:
        graph = write_vision_files(Path(folder) / _VISION_NAME).read_bytes()
    return {"tiles": json.dumps(tiles).encode(), "crops": json.dumps(crops).encode(), "graph": graph}


def artifact_seeds() -> dict[str, bytes]:
    """Sensitivity and routing, written as the product writes them."""
    from mopeq_edge.sensitivity.measure import TensorErrors

    values = np.ones((2, 3))
    errors = TensorErrors(("Q4_0", "F32"), {"imatrix": values}, {"imatrix": values}, np.ones(3))
    found = table.SensitivityTable(
        {"blk.0.ffn_up_exps.weight": errors}, {0: np.ones(3)}, ("imatrix",), "none", (), None, "x"
    )
    with TemporaryDirectory() as folder:
        table.write_table(found, Path(folder) / "table")
        write_routing(Routing(5, {0: np.ones(3)}, {0: np.ones(3)}, np.ones(4)), Path(folder) / "routing", "x")
        write_arrays(Path(folder) / "other", "mopeq-edge other", "1", {}, {"a": np.ones(1)})
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def main() -> None:
    """Write the files that tests/corpus has of each target; others there (of what was found) stay."""
    from tools.fuzz.__main__ import CORPUS, TARGETS

    for target in TARGETS:
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in seeds_of(target).items():
            (folder / name).write_bytes(data)


def seeds_of(target: str) -> dict[str, bytes]:
    """Files by name for one of the targets."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "seed"
        if target == "imatrix":
            write_imatrix(imatrix(), path)
            return {"imatrix": path.read_bytes()}
        if target == "plan":
            write_plan(plan(), path)
            return {"plan": path.read_bytes()}
    if target == "gguf":
        return gguf_seeds()
    if target == "index":
        index = {"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
        return {"index": json.dumps(index).encode()}
    if target == "config":
        quantized = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
        changes: list[dict[str, Any]] = [{}, {"rope_scaling": yarn}, {"quantization_config": quantized}]
        return {f"config{n}": json.dumps({**CONFIG, **change}).encode() for n, change in enumerate(changes)}
    if target == "tokenizer":
        both = {"tokenizer": tokenizer_json(), "tokenizer_config": dict(TOKENIZER_CONFIG)}
        return {"tokenizer": json.dumps(both).encode()}
    if target == "safetensors":
        shapes = {"a": (2, 3), "b": (), "c": (0, 4)}
        return {dtype: safetensors_bytes(shapes, dtype, width) for dtype, width in (("BF16", 2), ("F64", 8))}
    if target == "torch":
        return {"torch": torch_bytes()}
    if target == "artifacts":
        return artifact_seeds()
    if target == "vision":
        return vision_seeds()
    raise ValueError(target)


if __name__ == "__main__":
    main()
