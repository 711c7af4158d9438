"""The parts that llama.cpp's graphs are made of: norms, attention, feed-forward networks, mixtures of experts.

Each adds what the function of the same purpose in ``src/llama-graph.cpp`` adds, in its order.
"""

from __future__ import annotations

from mopeq_edge.errors import SourceError
from mopeq_edge.ggml.types import F16, F32, I32, GgmlType
from mopeq_edge.memory import graph as g
from mopeq_edge.memory.graph import I64, Graph, Tensor
from mopeq_edge.memory.kv_cache import KVCache
from mopeq_edge.memory.model import Hyperparameters, Model
from mopeq_edge.memory.settings import Resolved, Settings

SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3
"""How router logits become weights, as the key ``expert_gating_func`` numbers them."""


class Inputs:
    """What is filled for every batch: positions, cache cells, masks and rotations, made when first used."""

    def __init__(self, blocks: Blocks) -> None:
        n_tokens, hparams, cache = blocks.n_tokens, blocks.hparams, blocks.cache
        self.positions = g.new_input(I32, n_tokens * (4 if hparams.architecture == "qwen3vlmoe" else 1))
        self.outputs = g.new_input(I32, blocks.n_outputs)
        transposed = not blocks.settings.flash_attn
        widest = max(layer.n_embd_v for layer in cache.layers)
        cells = {False: cache.cells, True: cache.window_cells}
        self.k_cells = {window: g.new_input(I64, n_tokens) for window in cells}
        self.v_cells = {window: g.new_input(I64, n_tokens * (widest if transposed else 1)) for window in cells}
        streams = cache.n_stream
        kind = F16 if blocks.settings.flash_attn else F32
        self.masks = {window: g.new_input(kind, n, n_tokens // streams, 1, streams) for window, n in cells.items()}
        self.k_rotations = {window: _square(cache.rotate_k) for window in cells}
        self.v_rotations = {window: _square(cache.rotate_v) for window in cells}


def _square(n: int) -> Tensor | None:
    return g.new_input(F32, n, n) if n else None


class Blocks:
    """One graph under construction, for a batch of ``n_tokens`` of which ``n_outputs`` have logits.

    ``near``: a stand-in for the graph of an architecture that is not known, which may lack some of its tensors.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        resolved: Resolved,
        cache: KVCache,
        n_tokens: int,
        n_outputs: int,
        *,
        near: bool,
    ) -> None:
        self.model, self.settings, self.resolved, self.cache = model, settings, resolved, cache
        self.hparams: Hyperparameters = model.hparams
        self.n_tokens, self.n_outputs, self.near = n_tokens, n_outputs, near
        self.graph = Graph()
        self._tensors = model.stacks()
        self.inputs = Inputs(self)
        self._external: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        return name in self._tensors

    def weight(self, name: str) -> Tensor | None:
        """The weights of that name; of a stack in groups a tensor of the whole stack in its first group's type."""
        parts = self._tensors.get(name)
        if parts is None:
            return None
        if name not in self._external:
            first = parts[0]
            shape = list(first.shape)
            if len(parts) > 1:
                shape = [*(*shape, 1)[:2], sum((*p.shape, 1)[2] for p in parts)]
            self._external[name] = g.weight(first.type, *shape, name=name)
        return self._external[name]

    def need(self, name: str) -> Tensor:
        found = self.weight(name)
        if found is None:
            raise SourceError(
                f"{self.model.name}: tensor '{name}' is missing, expected for architecture "
                f"'{self.hparams.architecture}'; convert the model again"
            )
        return found

    def linear(self, name: str, x: Tensor) -> Tensor:
        """``x`` through the matrix NAME.weight, with its bias if there is one; as it is where a near graph lacks it."""
        if self.near and not self.has(f"{name}.weight"):
            return x
        y = g.mul_mat(self.need(f"{name}.weight"), x)
        bias = self.weight(f"{name}.bias")
        return y if bias is None else g.same("add", y, bias)

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.near and not self.has(f"{name}.weight"):
            return g.same("rms_norm", x)
        return g.same("mul", g.same("rms_norm", x), self.need(f"{name}.weight"))

    def embed(self) -> Tensor:
        """Rows of the embedding; beside it the input for embeddings from elsewhere, which is there in any case."""
        hparams, n = self.hparams, self.n_tokens
        wide = hparams.n_embd * (1 + hparams.n_deepstack)
        rows = g.get_rows(self.need("token_embd.weight"), g.new_input(I32, n))
        if wide != hparams.n_embd:
            rows = Tensor(F32, (wide, n), "pad", (rows,))
        self.graph.add(rows)
        self.graph.add(g.new_input(F32, wide, n))
        if wide != hparams.n_embd:
            rows = g.view(rows, (hparams.n_embd, n), rows.nb[1:2])
        self._embedded = rows
        if hparams.number("embedding_scale"):
            rows = g.same("scale", g.cont(rows) if not rows.contiguous else rows)
        return self.graph.add(rows)

    def deepstack(self) -> Tensor:
        """What pictures add behind a layer: a stretch of the embedding's input."""
        return g.view(self._embedded, (self.hparams.n_embd, self.n_tokens), self._embedded.nb[1:2])

    def rope(self, x: Tensor) -> Tensor:
        return g.same("rope", x, self.inputs.positions)

    def pick_outputs(self, x: Tensor) -> Tensor:
        """The rows whose logits are wanted."""
        return g.get_rows(x, self.inputs.outputs)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Attention over the cache with a K and a V; then the output matrix. q, k, v: [head, n_head, n_tokens]."""
        own = self.cache.layers[layer]
        window = own.window
        k_rot, v_rot = self.inputs.k_rotations[window], self.inputs.v_rotations[window]
        if k_rot is not None:
            q, k = _rotate(q, k_rot), _rotate(k, k_rot)
        if v_rot is not None:
            v = _rotate(v, v_rot)
        for tensor in (q, k, v) if any(self.hparams.swa) else (q, v, k):
            self.graph.add(tensor)
        n_head_kv = self.hparams.n_head_kv[layer]
        k_all = self._store(self.settings.cache_type_k, own.n_embd_k, own.cells, k, self.inputs.k_cells[window])
        heads_k = _heads(k_all, self.hparams.head_k, n_head_kv, own.cells, self.cache.n_stream)
        if self.settings.flash_attn:
            v_all = self._store(self.settings.cache_type_v, own.n_embd_v, own.cells, v, self.inputs.v_cells[window])
            heads_v = _heads(v_all, self.hparams.head_v, n_head_kv, own.cells, self.cache.n_stream)
        else:
            heads_v = self._store_transposed(layer, v)
        mixed = self._mix(q, heads_k, heads_v, self.inputs.masks[window], sinks, None)
        if v_rot is not None:
            mixed = _rotate(mixed, v_rot)
        return self.linear(f"blk.{layer}.attn_output", mixed)

    def attend_latent(self, layer: int, q: Tensor, k: Tensor, n_v: int) -> Tensor:
        """MLA: one head of K for all, V its first ``n_v`` values, taken apart by attn_v_b afterwards."""
        own = self.cache.layers[layer]
        for tensor in (q, k):
            self.graph.add(tensor)
        k_all = self._store(self.settings.cache_type_k, own.n_embd_k, own.cells, k, self.inputs.k_cells[False])
        heads = _heads(k_all, self.hparams.head_k, 1, own.cells, self.cache.n_stream)
        values = g.view(heads, (n_v, *heads.ne[1:]), heads.nb[1:])
        mixed = self._mix(q, heads, values, self.inputs.masks[False], None, self.need(f"blk.{layer}.attn_v_b.weight"))
        return self.linear(f"blk.{layer}.attn_output", mixed)

    def _store(self, kind: GgmlType, width: int, cells: int, rows: Tensor, ids: Tensor) -> Tensor:
        streams = self.cache.n_stream
        cache = g.weight(kind, width, cells, streams)
        flat = g.view(rows, (width, self.n_tokens), (rows.nb[2],))
        into = g.reshape(cache, width, cells * streams) if streams > 1 else cache
        self.graph.add(g.set_rows(into, flat, ids))
        return cache

    def _store_transposed(self, layer: int, v: Tensor) -> Tensor:
        """V by rows of one value each, as the scores need it without flash attention."""
        own, streams, kind = self.cache.layers[layer], self.cache.n_stream, self.settings.cache_type_v
        width = own.n_embd_v
        cache = g.weight(kind, width, own.cells, streams)
        whole = v.nb[2] == v.type.nbytes(width)
        flat = g.reshape(v, width, self.n_tokens) if whole else g.cont(v, width, self.n_tokens)
        into = g.reshape(cache, 1, cache.n_elements)
        self.graph.add(g.set_rows(into, g.reshape(flat, 1, flat.n_elements), self.inputs.v_cells[own.window]))
        head, n_head_kv = self.hparams.head_v, self.hparams.n_head_kv[layer]
        row = kind.nbytes(own.cells)
        return g.view(cache, (own.cells, n_head_kv, head, streams), (row * head, row, row * width))

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, latent: Tensor | None
    ) -> Tensor:
        """Softmax of the scores times the values, heads side by side: [n_head * head, n_tokens]."""
        streams = k.ne[3]
        transposed = v.nb[1] > v.nb[2]
        per_stream = q.ne[2] // streams
        q = g.view(q, (q.ne[0], q.ne[1], per_stream, streams), (q.nb[1], q.nb[2], q.nb[2] * per_stream))
        q, k, v = (g.permute(t, 0, 2, 1, 3) for t in (q, k, v))
        if self.settings.flash_attn:
            mixed = g.flash_attention(q, k, v, mask, sinks)
            if latent is not None:
                heads = g.mul_mat(latent, g.permute(mixed, 0, 2, 1, 3))
                mixed = g.cont(g.permute(heads, 0, 2, 1, 3))
            ne = mixed.ne
            result = g.reshape(mixed, ne[0] * ne[1], ne[2] * ne[3])
        else:
            scores = g.same("soft_max", g.mul_mat(k, q), mask, *(() if sinks is None else (sinks,)))
            values = v if transposed else g.cont(g.permute(v, 1, 0, 2, 3))
            heads = g.mul_mat(values, scores)
            if latent is not None:
                heads = g.mul_mat(latent, heads)
            heads = g.permute(heads, 0, 2, 1, 3)
            ne = heads.ne
            result = g.cont(heads, ne[0] * ne[1], ne[2] * ne[3])
        return self.graph.add(result)

    def feed_forward(self, x: Tensor, prefix: str, suffix: str = "") -> Tensor:
        """A dense network with a gate, if there is one: PREFIX.ffn_up SUFFIX and so on."""
        up = self.linear(f"{prefix}.ffn_up{suffix}", x)
        if self.has(f"{prefix}.ffn_gate{suffix}.weight"):
            hidden = g.glu(self.linear(f"{prefix}.ffn_gate{suffix}", x), up)
        else:
            hidden = g.same("unary", up)
        return self.linear(f"{prefix}.ffn_down{suffix}", hidden)

    def _expert_linear(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        y = g.mul_mat_id(self.need(f"{name}.weight"), x, ids)
        scale, bias = self.weight(f"{name}.scale"), self.weight(f"{name}.bias")
        if scale is not None:
            n_expert, n_tokens = scale.ne[0], x.ne[2]
            every = g.repeat(g.reshape(scale, 1, n_expert, 1), 1, n_expert, n_tokens, 1)
            y = g.same("mul", y, g.get_rows(every, ids))
        return y if bias is None else g.same("add_id", y, bias, ids)

    def experts(self, x: Tensor, layer: int, *, gating: int, normalise: bool, scale: float) -> Tensor:
        """A mixture of experts: the router's choice, the networks of the chosen, their weighted sum."""
        prefix, hparams = f"blk.{layer}", self.hparams
        n_tokens, n_expert, n_used = x.ne[1], hparams.n_expert, hparams.n_expert_used
        logits = self.linear(f"{prefix}.ffn_gate_inp", x)
        probs = logits
        if gating != SOFTMAX_OF_CHOSEN:
            probs = g.same("soft_max" if gating == SOFTMAX else "unary", logits)
        ids = g.argsort_top_k(self._selection(probs, prefix), n_used)
        weights = g.get_rows(g.reshape(probs, 1, n_expert, n_tokens), ids)
        if gating == SOFTMAX_OF_CHOSEN:
            weights = g.reshape(g.same("soft_max", g.reshape(weights, n_used, n_tokens)), 1, n_used, n_tokens)
        if normalise:
            flat = g.reshape(weights, n_used, n_tokens)
            total = g.same("clamp", g.sum_rows(flat))
            weights = g.reshape(g.same("div", flat, total), 1, n_used, n_tokens)
        if scale not in (0.0, 1.0):
            weights = g.same("scale", weights)
        self.graph.add(weights)
        found = g.same("mul", self._networks(g.reshape(x, x.ne[0], 1, n_tokens), prefix, ids), weights)
        self.graph.add(found)
        parts = [self.graph.add(g.view(found, (found.ne[0], n_tokens), (found.nb[2],))) for _ in range(n_used)]
        total = parts[0]
        for part in parts[1:]:
            total = self.graph.add(g.same("add", total, part))
        return g.cont(total) if n_used == 1 else total

    def _selection(self, probs: Tensor, prefix: str) -> Tensor:
        """What is sorted: with a bias, and without the groups of experts that are not chosen."""
        bias, n_groups, n_tokens = self.weight(f"{prefix}.exp_probs_b.bias"), self.hparams.n_expert_groups, probs.ne[1]
        if bias is not None:
            probs = g.same("add", probs, bias)
        if n_groups <= 1:
            return probs
        n_each = self.hparams.n_expert // n_groups
        groups = g.reshape(probs, n_each, n_groups, n_tokens)
        best = g.get_rows(g.reshape(groups, 1, n_each, n_groups, n_tokens), g.argsort_top_k(groups, 2))
        score = g.sum_rows(g.reshape(best, 2, n_groups, n_tokens))
        n_chosen = int(self.hparams.number("expert_group_used_count"))
        chosen = g.argsort_top_k(g.reshape(score, n_groups, n_tokens), n_chosen)
        kept = g.get_rows(groups, chosen)
        return g.reshape(g.set_rows(g.same("fill", groups), kept, chosen), self.hparams.n_expert, n_tokens)

    def _networks(self, x: Tensor, prefix: str, ids: Tensor) -> Tensor:
        if self.has(f"{prefix}.ffn_gate_up_exps.weight"):
            both = self._expert_linear(f"{prefix}.ffn_gate_up_exps", x, ids)
            ne = (both.ne[0] // 2, *both.ne[1:3])
            hidden = g.glu(g.view(both, ne, both.nb[1:3]), g.view(both, ne, both.nb[1:3]))
        else:
            up = self._expert_linear(f"{prefix}.ffn_up_exps", x, ids)
            if self.has(f"{prefix}.ffn_gate_exps.weight"):
                hidden = g.glu(self._expert_linear(f"{prefix}.ffn_gate_exps", x, ids), up)
            else:
                hidden = g.same("unary", up)
        return self._expert_linear(f"{prefix}.ffn_down_exps", hidden, ids)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    n = rotation.ne[0]
    rows = x.n_elements // n
    flat = g.reshape(x, n, rows) if x.contiguous else g.cont(x, n, rows)
    return g.reshape(g.mul_mat(rotation, flat), *x.ne)


def _heads(cache: Tensor, head: int, n_head: int, cells: int, streams: int) -> Tensor:
    """[head, n_head, cells, streams] of the cache."""
    row = cache.nb[1]
    return g.view(cache, (head, n_head, cells, streams), (cache.type.nbytes(head), row, row * cells))
