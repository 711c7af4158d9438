"""The sliced form against the dense model: the same in float64, and with slices left out what that must give."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from converters.pre_tokenizer import pre_tokenizer_name
from mopeq_edge.errors import PlanError, SourceError
from tools.dense_llama import unpermuted
from tools.slice_dense import main, save_checkpoint, sliced_config, sliced_weights
from tools.slices import Slicing

from .dense_models import HEAD_DIM, PAIRED, random_llama, write_dense_gguf

IDS = torch.randint(1, 97, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMS norms in the type of their input; transformers' own compute in float32."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(MixtralRMSNorm, "forward", forward)


def slicings_of(layers: int, n: int, router_scale: float) -> list[Slicing]:
    """Neurons drawn at random, equal or random routers."""
    generator = torch.Generator().manual_seed(2)
    return [
        Slicing(
            torch.randperm(96, generator=generator).reshape(n, -1),
            router_scale * torch.randn(n, 48, generator=generator),
        )
        for _ in range(layers)
    ]


def load_sliced(
    dense: Any, directory: Path, slicings: list[Slicing], used: int, hidden: int = 64, dtype: Any = torch.float64
) -> Any:
    """The sliced form through its files, with the plain implementation of experts."""
    config = sliced_config(dense.config, len(slicings[0].neurons), used, hidden)
    weights = {k: v for k, v in dense.state_dict().items() if k != "lm_head.weight" or not config.tie_word_embeddings}
    save_checkpoint(directory, config, sliced_weights(weights, 48, config, slicings), dtype)
    loaded, report = MixtralForCausalLM.from_pretrained(
        directory, dtype=dtype, experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    return loaded.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(("n", "hidden", "tied"), [(4, 64, True), (2, 64, False), (8, 48, True), (1, 256, True)])
def test_with_all_slices_used_the_logits_are_the_dense_ones(
    n: int, hidden: int, tied: bool, tmp_path: Path, exact_norms: None
) -> None:
    """Numbers of experts whose reciprocals float32 holds, for the router's softmax is in float32."""
    dense = random_llama(vocab=97, layers=3, tied=tied)
    sliced = load_sliced(dense, tmp_path, slicings_of(3, n, 0.0), n, hidden)
    expected = logits(dense)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(sliced), expected, rtol=0, atol=1e-10)


def test_six_slices_are_exact_up_to_the_rounding_of_the_softmax(tmp_path: Path, exact_norms: None) -> None:
    dense = random_llama(vocab=97)
    sliced = load_sliced(dense, tmp_path, slicings_of(2, 6, 0.0), 6)
    torch.testing.assert_close(logits(sliced), logits(dense), rtol=0, atol=1e-5)


def test_left_out_slices_are_missing_and_the_others_nearly_unchanged(tmp_path: Path, exact_norms: None) -> None:
    """The dense model where a neuron counts for three times its slice's gate weight, or not at all if left out."""
    dense = random_llama(vocab=97)
    slicings = slicings_of(2, 6, 0.002)
    sliced = logits(load_sliced(dense, tmp_path, slicings, 3))
    whole = logits(dense)
    factors: list[torch.Tensor] = []
    for layer, slicing in zip(dense.model.layers, slicings, strict=True):
        inputs: list[torch.Tensor] = []
        layer.mlp.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))

        def leave_out(_: Any, args: Any, inputs: Any = inputs, slicing: Slicing = slicing) -> Any:
            scores = inputs[-1] @ slicing.router.double().T
            rank = (scores[..., None, :] > scores[..., :, None]).sum(-1)
            weight = torch.where(rank < 3, scores.exp(), 0.0)
            factor = 3 * weight / weight.sum(-1, keepdim=True)
            factors.append(factor)
            return (args[0] * factor[..., slicing.neurons.reshape(-1).argsort() // 16],)

        layer.mlp.down_proj.register_forward_pre_hook(leave_out)
    expected = logits(dense)
    assert (whole - expected).abs().max() > 0.1
    used = torch.cat(factors)[torch.cat(factors) > 0]
    assert len(used) == 2 * IDS.numel() * 3
    assert (used - 1).abs().max() < 0.05
    torch.testing.assert_close(sliced, expected, rtol=0, atol=1e-5)


def test_rows_of_q_and_k_go_back_to_halves() -> None:
    rows = torch.arange(2 * HEAD_DIM)[:, None].float()
    written = torch.cat([head[PAIRED] for head in rows.split(HEAD_DIM)])
    assert written[:3, 0].tolist() == [0, 8, 1]
    assert torch.equal(unpermuted(written, 2), rows)


def test_the_new_dimensions_are_zero_and_the_numbers_are_those_of_the_dense_model(tmp_path: Path) -> None:
    dense = random_llama(vocab=97)
    config = sliced_config(dense.config, 6, 4, 64)
    assert (config.intermediate_size, config.num_local_experts, config.num_experts_per_tok) == (16, 6, 4)
    assert (config.hidden_size, config.head_dim, config.num_attention_heads) == (64, 16, 3)
    assert config.rms_norm_eps == pytest.approx(1e-3 * 48 / 64)
    weights = sliced_weights(dense.state_dict(), 48, config, slicings_of(2, 6, 1.0))
    expert = weights["model.layers.1.block_sparse_moe.experts.5.w2.weight"]
    assert expert.shape == (64, 16)
    assert not expert[48:].any()
    assert not weights["model.layers.0.block_sparse_moe.gate.weight"][:, 48:].any()
    assert weights["model.layers.0.self_attn.o_proj.weight"].shape == (64, 48)
    assert weights["model.layers.0.self_attn.q_proj.weight"].shape == (48, 64)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((7, 7, 64), "--experts 7: does not divide the 96 neurons"),
        ((6, 7, 64), "--used 7: expected 1 to 6"),
        ((6, 6, 32), "--hidden 32: is below the model's 48"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers: tuple[int, int, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        sliced_config(random_llama(vocab=97).config, *numbers)


@pytest.fixture(scope="module")
def dense_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "random.gguf"
    write_dense_gguf(random_llama(), path)
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_clusters_are_exact_too_when_all_are_used(dense_file: Path, tmp_path: Path) -> None:
    result = run(dense_file, tmp_path / "out", "--slices", "clustered", "--tokens", 300, "--threads", 1)
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out" / "slicing.json").read_text())
    assert (numbers["slices"], numbers["tokens"]) == ("clustered", 256)
    assert numbers["held_out_loss_nats"]["sliced"] == pytest.approx(numbers["held_out_loss_nats"]["dense"], abs=0.01)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    routers = [value for name, value in weights.items() if name.endswith("gate.weight")]
    assert len(routers) == 2
    assert not any(router.any() for router in routers)
    first = weights["model.layers.0.block_sparse_moe.experts.0.w1.weight"][:, :48]
    gate = random_llama().model.layers[0].mlp.gate_proj.weight.to(torch.bfloat16)
    assert not torch.equal(first, gate[:16])
    assert {tuple(row) for row in first.tolist()} <= {tuple(row) for row in gate.tolist()}


def test_the_command_slices_the_gguf_in_a_wheel(dense_file: Path, tmp_path: Path) -> None:
    wheel, out = tmp_path / "some-1.0-py3-none-any.whl", tmp_path / "out"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(dense_file, "some/model.gguf")
    result = run(wheel, out, "--tokens", 512, "--threads", 1)
    assert result.exit_code == 0, result.output
    numbers = json.loads((out / "slicing.json").read_text())
    assert numbers["source"]["gguf_sha256"] == hashlib.sha256(dense_file.read_bytes()).hexdigest()
    assert (numbers["experts"], numbers["used"], numbers["slices"], numbers["hidden"]) == (6, 6, "contiguous", 256)
    # What is lost is the rounding to BF16
    losses = numbers["held_out_loss_nats"]
    assert losses["sliced"] == pytest.approx(losses["dense"], abs=0.01)
    model = MixtralForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    dense = random_llama().float()
    text = (out / "evaluation.txt").read_text(encoding="utf-8")[:4000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(out)(text).input_ids[:512]).reshape(2, 256)
    with torch.no_grad():
        expected = torch.stack([dense(part[None], labels=part[None]).loss for part in ids]).mean()
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=0.2)
    assert losses["dense"] == pytest.approx(expected.item(), abs=1e-3)
    assert sorted(path.name for path in out.iterdir()) == [
        *("TEXT-LICENCES.txt", "calibration.txt", "chat_template.jinja", "config.json", "evaluation.txt"),
        *("generation_config.json", "model.safetensors", "slicing.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]


def test_a_sparse_form_is_the_same_each_time_and_worse_than_the_dense(dense_file: Path, tmp_path: Path) -> None:
    made = [tmp_path / name for name in "ab"]
    for out in made:
        result = run(dense_file, out, "--used", 2, "--tokens", 512, "--threads", 1)
        assert result.exit_code == 0, result.output
    for path in made[0].iterdir():
        assert path.read_bytes() == (made[1] / path.name).read_bytes(), path.name
    assert json.loads((made[0] / "slicing.json").read_text())["slices"] == "clustered"
    config = MixtralConfig.from_pretrained(made[0])
    assert (config.num_experts_per_tok, config.num_local_experts) == (2, 6)


@pytest.mark.runtime
def test_the_tokenizer_of_this_small_vocabulary_is_not_mistaken_for_a_plain_one(
    dense_file: Path, tmp_path: Path
) -> None:
    """llama.cpp's table knows real vocabularies only; what is left is the definition, which differs from GPT-2's."""
    assert run(dense_file, tmp_path / "out", "--tokens", 256).exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    with pytest.raises(SourceError, match=r"pre-tokenizer Digits \+ ByteLevel"):
        pre_tokenizer_name(tmp_path / "out", tokenizer)


def test_nothing_is_written_over_and_nothing_is_left_of_a_failure(dense_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(dense_file, out, "--tokens", 10_000_000)
    assert result.exit_code == 1
    assert "--tokens 10000000: expected 256 to" in result.output
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    result = run(dense_file, out)
    assert result.exit_code == 1
    assert f"Error: {out}: exists already" in result.output
