"""A causal language model of which one block at a time has weights in memory.

transformers builds the modules without weights; a block gets its weights from the checkpoint when it is
its turn and loses them afterwards. The experts are ours, so that each one can be watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mopeq_edge.calibrate.experts import ExpertWeights, RoutedExperts, Tap, gated_by
from mopeq_edge.calibrate.latent import ATTENTION, LatentWatch
from mopeq_edge.errors import CalibrationError, SourceError, printable
from mopeq_edge.ggml.types import BF16, F16, MXFP4, GgmlType
from mopeq_edge.heap import return_freed_memory
from mopeq_edge.imatrix import EMBEDDING
from mopeq_edge.source.converter import Part
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.model import read_rows

_STORED: Mapping[GgmlType, torch.dtype] = {BF16: torch.bfloat16, F16: torch.float16, MXFP4: torch.bfloat16}
"""torch types that hold every number of a type."""

_FULL, _SLIDING = "full_attention", "sliding_attention"

Change = Callable[[str, Tensor], None]
"""Changes a stack of experts [n_expert, n_out, n_in], given its GGUF name, in place."""


class BlockModel:
    """The forward parts of a checkpoint: embedding rows, blocks, final norm and output matrix."""

    def __init__(self, source: HuggingFaceSource) -> None:
        self.source = source
        self.tap = Tap()
        config, base = _build(source)
        self._config = config
        self._prefix = source.skeleton.prefix
        self._layers: nn.ModuleList = base.layers
        self._norm: nn.Module = base.norm
        # built outside the meta device: its frequencies are computed, not loaded
        self._rotary: nn.Module = type(base.rotary_emb)(config=config)
        self.n_layer = len(self._layers)
        self.n_embd = int(config.hidden_size)
        self.n_vocab = int(config.vocab_size)
        skeleton = source.skeleton
        multiplier, divisor = skeleton.embedding_multiplier, skeleton.logits_divisor
        self.embedding_scale = 1.0 if multiplier is None else float(getattr(config, multiplier))
        """What the rows of the embedding are multiplied by."""
        self.logits_scale = 1.0 if divisor is None else 1.0 / float(getattr(config, divisor))
        """What the output matrix's products are multiplied by to be logits."""
        self._by_name = {t.name: t for t in source.tensors}
        self._gguf_name = {
            (recipe.parts[0].tensor, recipe.parts[0].rows): name
            for name, recipe in source.hf_tensor_of.items()
            if len(recipe.parts) == 1 and _is_stored(recipe.parts[0])
        }

    def embed(self, tokens: npt.NDArray[np.int32]) -> Tensor:
        """Rows of the token embedding, scaled, [n_tokens, n_embd]; reads only the rows that occur."""
        table = self._by_name[EMBEDDING]
        ids, inverse = np.unique(tokens, return_inverse=True)
        rows = read_rows(self.source, table, 0, ids)
        return torch.from_numpy(rows)[torch.from_numpy(inverse.reshape(-1))].mul_(self.embedding_scale)

    @property
    def output_name(self) -> str:
        """GGUF name of the output matrix: the embedding's when the two are tied."""
        return "output.weight" if "output.weight" in self._by_name else EMBEDDING

    def output_matrix(self) -> Tensor:
        """The output matrix [n_vocab, n_embd]."""
        return torch.from_numpy(self.source.read(self._by_name[self.output_name]))

    def positions(self, n_ctx: int, layer: int) -> dict[str, Any]:
        """Rotary embeddings, position ids and attention mask of a window, as block ``layer`` takes them."""
        ids = torch.arange(n_ctx).unsqueeze(0)
        probe = torch.zeros(1, n_ctx, self.n_embd)
        mask = self._mask(n_ctx, layer)
        masked = {} if mask is None else {"attention_mask": mask}
        return {"position_ids": ids, "position_embeddings": self._rotary(probe, ids), **masked}

    def _mask(self, n_ctx: int, layer: int) -> Tensor | None:
        """What is added to the scores of a window [1, 1, n_ctx, n_ctx]; None where attention is causal by itself."""
        kind = (getattr(self._config, "layer_types", None) or [_FULL] * self.n_layer)[layer]
        if kind not in (_FULL, _SLIDING):
            raise CalibrationError(
                f"{self.source.path}: block {layer} has {kind}, expected {_FULL} or {_SLIDING}; "
                "give an imatrix made by llama-imatrix with --imatrix"
            )
        if kind == _FULL and self._config._attn_implementation != "eager":
            return None
        allowed = torch.ones(n_ctx, n_ctx, dtype=torch.bool).tril()
        if kind == _SLIDING:
            # a token sees itself and the window's others before it
            allowed = allowed.triu(1 - int(self._config.sliding_window))
        return torch.zeros(n_ctx, n_ctx).masked_fill_(~allowed, torch.finfo(torch.float32).min)[None, None]

    @contextmanager
    def block(self, layer: int, change: Change | None = None) -> Iterator[nn.Module]:
        """Block ``layer`` with its weights; its matrices report to ``self.tap`` while it is open.

        ``change`` may alter the experts' weights, of this call only.
        """
        block: Any = self._layers[layer]
        where, _, attribute = self.source.skeleton.experts.rpartition(".")
        ffn = block.get_submodule(where)
        # a dense layer has none
        original = getattr(ffn, attribute, None)
        if original is not None:
            gated = self.source.skeleton.gated or gated_by(original.act_fn)
            setattr(ffn, attribute, RoutedExperts(self._experts(layer, change), gated, self.tap))
        hooks = []
        detach = self._watch_latent(block, layer)
        try:
            prefix = f"{self._prefix}{self.source.skeleton.layers}{layer}."
            self._load(block, prefix)
            for name, module in block.named_modules():
                gguf_name = self._gguf_name.get(self._stored(prefix, f"{name}.weight"))
                if gguf_name is not None and len(self._by_name[gguf_name].shape) == 2:
                    hooks.append(module.register_forward_hook(self._watcher(gguf_name)))
            yield block
        finally:
            for hook in hooks:
                hook.remove()
            detach()
            if original is not None:
                setattr(ffn, attribute, original)
            block.to("meta")
            return_freed_memory()

    @contextmanager
    def final_norm(self) -> Iterator[nn.Module]:
        """The norm before the output matrix, with its weights."""
        self._load(self._norm, f"{self._prefix}{self.source.skeleton.norm}")
        try:
            yield self._norm
        finally:
            self._norm.to("meta")

    def _load(self, module: nn.Module, prefix: str) -> None:
        # parameters, and buffers that are loaded, such as the bias of a router
        state = {name: self._read(*self._stored(prefix, name)) for name in module.state_dict()}
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False)

    def _stored(self, prefix: str, name: str) -> tuple[str, tuple[int, int] | None]:
        """The checkpoint's tensor that has the parameter or buffer ``name`` of a block, and its rows there if fused."""
        fused = self.source.skeleton.fused.get(name)
        if fused is not None:
            tensor, which, n_pieces = fused
            n_rows = self.source.checkpoint.shape(prefix + tensor)[0] // n_pieces
            return prefix + tensor, (which * n_rows, (which + 1) * n_rows)
        for ours, theirs in self.source.skeleton.renamed.items():
            if name.startswith(ours):
                return prefix + theirs + name.removeprefix(ours), None
        return prefix + name, None

    def _read(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        if name not in self.source.checkpoint.names:
            raise CalibrationError(
                f"{self.source.path}: transformers' model needs tensor '{name}', which the checkpoint does not "
                "have; give an imatrix made by llama-imatrix with --imatrix"
            )
        checkpoint = self.source.checkpoint
        return torch.from_numpy(checkpoint.read_f32(name) if rows is None else checkpoint.read_rows(name, *rows))

    def _experts(self, layer: int, change: Change | None) -> ExpertWeights:
        stacks, biases = {}, {}
        for projection in ("gate", "up", "down"):
            tensor = self._by_name[f"blk.{layer}.ffn_{projection}_exps.weight"]
            # the checkpoint's type holds the same numbers in half the memory; what is changed needs more digits
            same = change is None and self.source.is_exact(tensor)
            dtype = _STORED.get(tensor.type, torch.float32) if same else torch.float32
            stack = torch.empty(tensor.n_matrices, tensor.n_out, tensor.n_in, dtype=dtype)
            for expert in range(tensor.n_matrices):
                stack[expert] = torch.from_numpy(self.source.read(tensor, expert))
            if change is not None:
                change(tensor.name, stack)
            stacks[projection] = stack
            bias = self._by_name.get(f"blk.{layer}.ffn_{projection}_exps.bias")
            if bias is not None:
                biases[projection] = torch.from_numpy(self.source.read(bias))
        return ExpertWeights(layer, **stacks, biases=biases)

    def _watch_latent(self, block: nn.Module, layer: int) -> Callable[[], None]:
        """Watch the latent attention of a block, if it is one, until the returned function is called."""
        latent = self.source.skeleton.latent
        if latent is None:
            return lambda: None
        keys, values = (self._by_name[f"blk.{layer}.{name}"] for name in (latent.keys, latent.values))
        watch = LatentWatch(keys, values, self.tap)
        return watch.attach(block.get_submodule(latent.attention), block.get_submodule(latent.module))

    def _watcher(self, name: str) -> Any:
        def saw(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            recorder = self.tap.recorder
            if recorder is None:
                return
            x = args[0].reshape(-1, args[0].shape[-1])
            recorder.saw_input(name, x)
            # a router returns a tuple; it stays F32 and needs no gradient
            if isinstance(output, Tensor):
                recorder.watch_output(name, x, output)

        return saw


def _build(source: HuggingFaceSource) -> tuple[Any, Any]:
    """transformers' configuration and decoder for the checkpoint, without weights."""
    with torch.device("meta"):
        if source.skeleton.base is not None:
            config, base = source.skeleton.base(source.path, source.config)
            config._attn_implementation = _attention(source)
            return config, base.eval()
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
            # the weights are ours to read, whatever they are stored in
            config.quantization_config = None
            config._attn_implementation = _attention(source)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
        except Exception as error:
            # transformers raises whatever it likes for a config.json of another model, or one that needs its own code
            reason = printable(str(error), 200)
            raise SourceError(
                f"{source.path}: transformers cannot build the model of its config.json ({reason}); "
                "use the config.json of these weights"
            ) from None
        return config, getattr(model, model.base_model_prefix)


def _attention(source: HuggingFaceSource) -> str:
    """Name of transformers' attention function: our own where attention is latent and is watched."""
    return source.skeleton.attention if source.skeleton.latent is None else ATTENTION


def _is_stored(part: Part) -> bool:
    """Whether the checkpoint has the matrix in one piece, as a module's weight has it."""
    return part == Part(part.tensor, rows=part.rows, heads=part.heads)
