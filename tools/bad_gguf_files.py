"""GGUF files as a stranger could make them: each function is one kind, at most 80 kB, the same every time."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

from mopeq_edge.expert_groups.layout import VERSION_KEY
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import encode_kv, string, uint32
from tools.fuzz.seeds import gguf_bytes, model_kvs, model_specs

BAD_MAP = struct.pack("<8i", 0, -1, -1, 0, -1, 1, -1, 9)


def header(*kvs: bytes, tensors: Sequence[bytes] = (), n_kvs: int | None = None, n_tensors: int | None = None) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(kvs) if n_kvs is None else n_kvs)
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(kvs) + b"".join(tensors)


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def info(name: bytes, shape: Sequence[int], type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


def tensor_file(*tensors: bytes) -> bytes:
    """A header with the architecture and 4 KiB behind it, so that nothing is refused just for being short."""
    raw = header(encode_kv("general.architecture", string("llama")), tensors=tensors)
    return raw + bytes(-len(raw) % 32 + 4096)


def model(**changes: KV | None) -> bytes:
    """A model of one layer, whole but for ``changes`` of its key-values (``__`` is a dot)."""
    kvs = {**model_kvs(), **{key.replace("__", "."): kv for key, kv in changes.items()}}
    return gguf_bytes({key: kv for key, kv in kvs.items() if kv is not None}, model_specs("F32"))


def nothing_wrong() -> bytes:
    return model()


def empty() -> bytes:
    return b""


def magic_alone() -> bytes:
    return b"GGUF"


def other_magic() -> bytes:
    return b"GGML" + bytes(60)


def version_1() -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(40)


def big_endian() -> bytes:
    return b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40)


def tensors_2_63() -> bytes:
    return header(n_tensors=2**63) + bytes(64)


def tensors_2_40() -> bytes:
    return header(n_tensors=2**40) + bytes(64)


def keys_2_62() -> bytes:
    return header(n_kvs=2**62) + bytes(64)


def key_of_2_62_bytes() -> bytes:
    return header(struct.pack("<Q", 2**62) + b"k") + bytes(64)


def key_of_2_64_bytes_less_8() -> bytes:
    """A reader that adds offsets in 64 bits comes back to where it was."""
    return header(struct.pack("<Q", 2**64 - 8) + b"k") + bytes(64)


def string_of_2_63_bytes() -> bytes:
    return header(text(b"k") + struct.pack("<IQ", 8, 2**63)) + bytes(64)


def array_of_2_40_bytes() -> bytes:
    return header(text(b"k") + struct.pack("<IIQ", 9, 0, 2**40))


def array_of_2_61_numbers() -> bytes:
    return header(text(b"k") + struct.pack("<IIQ", 9, 6, 2**61))


def array_of_2_40_strings() -> bytes:
    return header(text(b"k") + struct.pack("<IIQ", 9, 8, 2**40)) + bytes(64)


def arrays_in_arrays() -> bytes:
    return header(text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQB", 0, 1, 7))


def unknown_value_type() -> bytes:
    return header(text(b"k") + struct.pack("<IQ", 13, 0)) + bytes(64)


def key_twice() -> bytes:
    return header(*[encode_kv("k", uint32(1))] * 2) + bytes(64)


def key_no_utf_8() -> bytes:
    return header(text(b"\xff\xfe") + struct.pack("<II", 4, 1)) + bytes(64)


def key_with_escapes() -> bytes:
    return header(text(b"\x1b[2Jk\n") + struct.pack("<II", 4, 1)) + bytes(64)


def alignment_0() -> bytes:
    return model(general__alignment=uint32(1)).replace(
        encode_kv("general.alignment", uint32(1)), encode_kv("general.alignment", uint32(0))
    )


def alignment_48() -> bytes:
    return model(general__alignment=uint32(48))


def alignment_2_31() -> bytes:
    raw = encode_kv("general.alignment", uint32(2**31))
    return model().replace(encode_kv("general.alignment", uint32(32)), raw)


def alignment_as_text() -> bytes:
    return header(encode_kv("general.alignment", string("32"))) + bytes(64)


def no_axes() -> bytes:
    return tensor_file(info(b"a", ()))


def five_axes() -> bytes:
    return tensor_file(info(b"a", (1,) * 5))


def axes_2_32() -> bytes:
    return header(tensors=[text(b"a") + struct.pack("<I", 2**32 - 1)]) + bytes(4096)


def axis_of_0() -> bytes:
    return tensor_file(info(b"a", (0, 4)))


def axis_below_0() -> bytes:
    return tensor_file(info(b"a", (2**64 - 4, 4)))


def product_wraps_to_0() -> bytes:
    return tensor_file(info(b"a", (2**32, 2**32)))


def product_wraps_to_64() -> bytes:
    return tensor_file(info(b"a", (2**59 + 1, 2**4 * 4, 1)))


def tensor_beyond_the_file() -> bytes:
    return tensor_file(info(b"a", (2**20,)))


def offset_beyond_the_file() -> bytes:
    return tensor_file(info(b"a", (4,), 0, 2**40))


def offset_wraps() -> bytes:
    return tensor_file(info(b"a", (4,), 0, 2**64 - 64))


def offset_not_aligned() -> bytes:
    return tensor_file(info(b"a", (4,)), info(b"b", (4,), 0, 20))


def tensors_overlap() -> bytes:
    return tensor_file(info(b"a", (64,)), info(b"b", (64,), 0, 32))


def tensors_out_of_order() -> bytes:
    return tensor_file(info(b"a", (8,), 0, 32), info(b"b", (8,), 0, 0))


def tensor_twice() -> bytes:
    return tensor_file(info(b"a", (8,)), info(b"a", (8,), 0, 32))


def unknown_tensor_type() -> bytes:
    return tensor_file(info(b"a", (32,), 4000))


def removed_tensor_type() -> bytes:
    return tensor_file(info(b"a", (32,), 4))


def part_of_a_block() -> bytes:
    return tensor_file(info(b"a", (33,), 8))


def name_of_64_bytes() -> bytes:
    return tensor_file(info(b"x" * 64, (8,)))


def name_no_utf_8() -> bytes:
    return tensor_file(info(b"\xff\xfe", (8,)))


def name_with_escapes() -> bytes:
    return tensor_file(info(b"\x1b[2J\n", (8,)))


def data_cut_off() -> bytes:
    return model()[:-4096]


def header_cut_off() -> bytes:
    return model()[:700]


def blocks_2_32() -> bytes:
    return model(olmoe__block_count=uint32(2**32 - 1))


def blocks_as_text() -> bytes:
    return model(olmoe__block_count=string("1"))


def fewer_blocks_than_tensors() -> bytes:
    return model(olmoe__block_count=uint32(0))


def experts_2_31() -> bytes:
    return model(olmoe__expert_count=uint32(2**31))


def other_number_of_experts() -> bytes:
    return model(olmoe__expert_count=uint32(8))


def more_experts_used_than_there() -> bytes:
    return model(olmoe__expert_used_count=uint32(5))


def experts_as_array() -> bytes:
    return model(olmoe__expert_count=KV(ValueType.ARRAY, [4], ValueType.UINT32))


def architecture_as_number() -> bytes:
    return model(general__architecture=uint32(1))


def expert_map_out_of_range() -> bytes:
    kvs = {**model_kvs(), VERSION_KEY: uint32(1)}
    return gguf_bytes(kvs, model_specs("Q4_0", grouped=True), {"blk.0.ffn_up_exps.map": BAD_MAP})


FILES: Mapping[str, Callable[[], bytes]] = {
    build.__name__: build
    for build in (
        nothing_wrong,
        empty,
        magic_alone,
        other_magic,
        version_1,
        big_endian,
        tensors_2_63,
        tensors_2_40,
        keys_2_62,
        key_of_2_62_bytes,
        key_of_2_64_bytes_less_8,
        string_of_2_63_bytes,
        array_of_2_40_bytes,
        array_of_2_61_numbers,
        array_of_2_40_strings,
        arrays_in_arrays,
        unknown_value_type,
        key_twice,
        key_no_utf_8,
        key_with_escapes,
        alignment_0,
        alignment_48,
        alignment_2_31,
        alignment_as_text,
        no_axes,
        five_axes,
        axes_2_32,
        axis_of_0,
        axis_below_0,
        product_wraps_to_0,
        product_wraps_to_64,
        tensor_beyond_the_file,
        offset_beyond_the_file,
        offset_wraps,
        offset_not_aligned,
        tensors_overlap,
        tensors_out_of_order,
        tensor_twice,
        unknown_tensor_type,
        removed_tensor_type,
        part_of_a_block,
        name_of_64_bytes,
        name_no_utf_8,
        name_with_escapes,
        data_cut_off,
        header_cut_off,
        blocks_2_32,
        blocks_as_text,
        fewer_blocks_than_tensors,
        experts_2_31,
        other_number_of_experts,
        more_experts_used_than_there,
        experts_as_array,
        architecture_as_number,
        expert_map_out_of_range,
    )
}
"""By the name of the kind."""
