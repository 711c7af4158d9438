"""A test-size Qwen3-VL-MoE with everything that a released one has beside the weights: image processor, tokens, chat
template.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..builders import edit_json
from ..converters.families import VOCAB, build_qwen3_vl_moe

PATCH, MERGE = 4, 2
STEP = PATCH * MERGE
"""A side that is a multiple of it is not scaled."""
TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
"""In the order of the ids that the checkpoint's config.json names, the last of the vocabulary."""
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}\n"
    "{% endfor %}assistant:"
)


def build_seeing(directory: Path, dtype: str) -> Path:
    # llama.cpp wants more layers than those that get states of the vision model
    build_qwen3_vl_moe(directory, dtype, layers=3)
    processor = {
        **{"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": PATCH, "temporal_patch_size": 2},
        **{"merge_size": MERGE, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
        "size": {"shortest_edge": 8 * STEP**2, "longest_edge": 4096 * STEP**2},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    path = directory / "tokenizer.json"
    added = json.loads(path.read_text())["added_tokens"]
    for at, token in enumerate(TOKENS):
        added.append({**added[0], "id": VOCAB - len(TOKENS) + at, "content": token})
    edit_json(path, added_tokens=added)
    edit_json(directory / "tokenizer_config.json", chat_template=TEMPLATE)
    return directory
