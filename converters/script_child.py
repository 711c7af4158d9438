"""llama.cpp's ``convert_hf_to_gguf.py`` in a process of its own, held back from running code of the model's directory.

:mod:`converters.by_script` starts this file by its path, with the script's folder and a JSON object of the fields of
:class:`Job`. What is true of the script of llama-cpp-python 0.3.36, read in its text:

- It loads ``config.json`` with ``trust_remote_code=False``, but the tokenizers of many families (HunYuan, Kimi,
  MiniMax, Nemotron-H, the older Qwen) with True: transformers would then import the Python files that ``auto_map`` of a
  directory names. So here the Auto classes that it uses get False, and the one function of transformers
  that imports a file of a model raises. A tokenizer that exists as such a file only is refused.
- ``torch.load`` reads weights that are no safetensors, and a table of one family, always with ``weights_only=True``. A
  directory without safetensors is refused before the script starts.
- Tokenizer files (JSON, sentencepiece, tiktoken) are read as data, and a chat template is copied, not rendered.
- The current folder and this file's are taken off the path of imports, since a checkpoint may be the current folder.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNKNOWN_PRE_TOKENIZER = "llama.cpp knows no such pre-tokenizer"
CODE_REFUSED = "needs Python code of its directory, which is never run"

AUTO_CLASSES = ("AutoConfig", "AutoTokenizer")
"""Those that the script uses; others need packages that may not be installed, and are stopped at the import."""


@dataclass(frozen=True)
class Job:
    """What to convert. ``pre`` overrides the pre-tokenizer's name, ``plain`` names one that llama.cpp does not know.

    ``header_only`` writes the header and leaves a hole of the data's size. ``mmproj``: what sees pictures, instead of
    the text model, with these key-values too; lists are of strings that are made as long as there are tensors.
    """

    model: str
    output: str
    pre: str | None = None
    plain: str | None = None
    header_only: bool = False
    outtype: str = "bf16"
    mmproj: dict[str, str | list[str]] | None = None


class RefusedError(ValueError):
    """Something that the script wants and does not get; a ValueError, as transformers raises where trust is lacking."""


def main(folder: str, job: Job) -> None:
    """Run the script in ``folder``; it ends the process with 1, or an exception, when it fails."""
    end_with_parent()
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() not in (here, Path.cwd())]
    sys.path[:0] = [str(Path(folder) / "gguf-py"), folder]
    refuse_code_of_models()
    name_pre_tokenizer(job)
    if job.header_only:
        leave_out_data()
    sys.argv = ["convert_hf_to_gguf.py", job.model, "--outtype", job.outtype, "--outfile", job.output]
    if job.mmproj is not None:
        add_key_values(job.mmproj)
        sys.argv.append("--mmproj")
    runpy.run_path(str(Path(folder) / "convert_hf_to_gguf.py"), run_name="__main__")


def end_with_parent() -> None:
    """End this process when the one that started it is gone: killed, it could not end it itself."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if os.name == "posix":
        threading.Thread(target=watch, daemon=True).start()


def refuse_code_of_models() -> None:
    """Make transformers unable to run a file of a checkpoint."""
    import transformers
    from transformers import dynamic_module_utils

    def no_module(*_: Any, **__: Any) -> Any:
        raise RefusedError(f"a file of the model {CODE_REFUSED}")

    dynamic_module_utils.get_class_in_module = no_module
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        auto.from_pretrained = staticmethod(_without_trust(auto.from_pretrained, name))


def _without_trust(load: Callable[..., Any], name: str) -> Callable[..., Any]:
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **{**kwargs, "trust_remote_code": False})
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise RefusedError(f"its {name.removeprefix('Auto').lower()} {CODE_REFUSED}") from None
            raise

    return from_pretrained


def name_pre_tokenizer(job: Job) -> None:
    """Give the name that the user gave, or that of a plain byte-level tokenizer that the script's table lacks."""
    text_model: Any = importlib.import_module("conversion.base").TextModel
    known = text_model.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        if job.pre is not None:
            return job.pre
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if job.plain is not None:
                return job.plain
            raise NotImplementedError(UNKNOWN_PRE_TOKENIZER) from None

    text_model.get_vocab_base_pre = named


def add_key_values(kvs: dict[str, str | list[str]]) -> None:
    """Write ``kvs`` behind the script's own: when the header is written, all tensors are known."""
    import gguf

    write = gguf.GGUFWriter.write_header_to_file

    def with_kvs(self: Any, *args: Any, **kwargs: Any) -> None:
        n_tensors = sum(len(tensors) for tensors in self.tensors)
        for key, value in kvs.items():
            if isinstance(value, str):
                self.add_string(key, value)
            else:
                self.add_array(key, value * n_tensors)
        write(self, *args, **kwargs)

    gguf.GGUFWriter.write_header_to_file = with_kvs


def leave_out_data() -> None:
    """Write names, shapes and key-values; the file gets its full size without the data being read."""
    import gguf

    def write(self: Any, **_: Any) -> None:
        self.write_ti_data_to_file()
        for file, tensors in zip(self.fout, self.tensors, strict=True):
            self.write_padding(file, file.tell())
            data = sum(self.ggml_pad(info.nbytes, self.data_alignment) for info in tensors.values())
            file.truncate(file.tell() + data)

    gguf.GGUFWriter.write_tensors_to_file = write


if __name__ == "__main__":
    main(sys.argv[1], Job(**json.loads(sys.argv[2])))
