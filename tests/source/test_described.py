"""What is remembered of a model, and when it is not believed."""

from __future__ import annotations

import os
from pathlib import Path

from mopeq_edge.pipeline_context import DESCRIPTION, open_context, open_description
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.described import KEY, DescribedSource, stamp
from tools.sparse_checkpoint import Size, write_sparse_checkpoint

SMALL = Size(n_layer=2, n_expert=8, hidden=256, ff=256, n_head=2, n_vocab=4200, sample_rows=2, shard_bytes=4 * 10**6)


def test_a_description_is_the_model_until_a_file_changes(tmp_path: Path) -> None:
    model, work = tmp_path / "model", tmp_path / "work"
    assert write_sparse_checkpoint(model, SMALL) > 10**6
    given = {"pre": "deepseek-v3", "threads": 1, "progress": SilentProgress()}
    whole = open_context(model, work, **given).source
    first, again = (open_description(model, work, **given).source for _ in range(2))
    assert not isinstance(first, DescribedSource)
    assert isinstance(again, DescribedSource)
    for name in ("path", "kind", "architecture", "tensors", "warnings", "files"):
        assert getattr(again, name) == getattr(whole, name)
    assert [(key, kv.encoded) for key, kv in again.kvs.items()] == [(key, kv.encoded) for key, kv in whole.kvs.items()]
    # no weight was read to plan
    assert not (work / "hashes.json").exists()
    content = open_context(model, work, **given).source_sha256
    assert open_description(model, work, **given).source_sha256 == content
    # other options, a file that is newer or joins, and a damaged description
    assert not isinstance(open_description(model, work, **{**given, "pre": "gpt-2"}).source, DescribedSource)
    open_description(model, work, **given)
    for change in (lambda: os.utime(model / "config.json", (1, 1)), lambda: (model / "merges.txt").touch()):
        assert isinstance(open_description(model, work, **given).source, DescribedSource)
        change()
        assert not isinstance(open_description(model, work, **given).source, DescribedSource)
    open_description(model, work, **given)
    kept = (work / DESCRIPTION).read_bytes()
    for broken in (
        b"{}",
        kept[: len(kept) // 2],
        kept.replace(KEY.encode(), b"x" * len(KEY)),
        kept.replace(b'"kind"', b'"kin"'),
    ):
        (work / DESCRIPTION).write_bytes(broken)
        assert not isinstance(open_description(model, work, **given).source, DescribedSource)


def test_bytecode_changes_nothing_and_code_does(tmp_path: Path) -> None:
    model, code = tmp_path / "model.gguf", tmp_path / "code"
    (code / "inner").mkdir(parents=True)
    for path in (model, code / "a.py", code / "inner" / "b.py"):
        path.write_text("1")
    first = stamp(model, [], [code])
    (code / "__pycache__").mkdir()
    (code / "__pycache__" / "a.pyc").touch()
    assert stamp(model, [], [code]) == first
    for path in (model, code / "a.py", code / "inner" / "b.py"):
        changed = stamp(model, [], [code])
        path.write_text("22")
        assert stamp(model, [], [code]) != changed
