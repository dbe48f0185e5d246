"""GGUF files: what llama.cpp has an architecture for, tensor by tensor; all else is refused by its reason."""

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from taipan.conversion.gguf import to_gguf
from taipan.errors import CheckpointError, ConfigError
from tests.command import run
from tests.models import small_model


@pytest.mark.parametrize(("stack", "architecture"), [("mamba2", "mamba2"), ("transformer", "llama")])
def test_every_weight_is_there_under_its_name(stack: str, architecture: str, tmp_path: Path) -> None:
    model = small_model(stack, dtype=torch.float32, n_groups=2, hidden_size=32, tie_word_embeddings=stack == "mamba2")
    model.save_pretrained(tmp_path / "model")
    assert to_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32") == architecture
    reader: Any = gguf.GGUFReader(tmp_path / "model.gguf")
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == architecture
    if stack == "mamba2":  # llama.cpp computes the width of ssm_in from one or the other
        names = ("mamba2.attention.head_count", "mamba2.ssm.time_step_rank")
        assert [reader.fields[name].contents() for name in names] == [model.config.num_mamba_heads] * 2
    written = sum(tensor.n_elements for tensor in reader.tensors)
    assert written == sum(parameter.numel() for parameter in model.parameters())
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    np.testing.assert_array_equal(found["token_embd.weight"], model.model.embed_tokens.weight.detach().numpy())
    if stack == "transformer":
        # a head's rows (0, 1, … 2n) stand as (0, n, 1, n + 1, …)
        weight = model.model.layers[0].mixer.q_proj.weight.detach()
        half = weight.shape[0] // 4
        order = [head * 2 * half + part * half + row for head in range(2) for row in range(half) for part in (0, 1)]
        np.testing.assert_array_equal(found["blk.0.attn_q.weight"], weight[order].numpy())


def test_a_stack_of_both_is_a_granite_hybrid_whose_recurrent_layers_have_no_heads(tmp_path: Path) -> None:
    model = small_model("jamba", dtype=torch.float32, hidden_size=32)
    kinds = model.config.layer_types
    model.save_pretrained(tmp_path / "model")
    assert to_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32") == "granitehybrid"
    reader: Any = gguf.GGUFReader(tmp_path / "model.gguf")
    heads = reader.fields["granitehybrid.attention.head_count_kv"].contents()
    assert heads == [0 if kind == "mamba2" else model.config.kv_heads for kind in kinds]
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for number, kind in enumerate(kinds):
        zeros = not found[f"blk.{number}.ffn_down.weight"].any()
        assert zeros == (kind == "mamba2")  # which has no MLP here
    written = sum(tensor.size for name, tensor in found.items() if "ffn" not in name or tensor.any())
    assert written == sum(parameter.numel() for parameter in model.parameters()) + 32 * kinds.count("mamba2")


@pytest.mark.parametrize(
    ("stack", "overrides", "reason"),
    [
        ("taipan", {}, "its layers are mamba2, selective_attention"),
        ("jamba", {"expand": 3}, "its Mamba-2 layers are .* wide, and llama.cpp takes twice"),
        ("mamba2", {"mamba_mlp": True}, "its Mamba-2 layers have MLPs and no other"),
        ("jamba", {"time_step_limit": (0.0, 0.5)}, r"its time_step_limit is \(0\.0, 0\.5\)"),
        ("mamba2", {"time_step_limit": (0.0, 0.5)}, r"its time_step_limit is \(0\.0, 0\.5\)"),
        ("transformer", {"attention_rope": False}, "its attention has no rotary embedding"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(
    stack: str, overrides: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    small_model(stack, dtype=torch.float32, **overrides).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"cannot be written for llama.cpp: {reason}"):
        to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_dtypes_and_paths_are_checked_first(tmp_path: Path) -> None:
    small_model("mamba2", dtype=torch.float32, hidden_size=32).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="dtype is 'q5_0', but must be one of f32, bf16, q8_0, q4_0"):
        to_gguf(tmp_path / "model", tmp_path / "model.gguf", "q5_0")
    assert run("convert", "to-gguf", tmp_path / "model", tmp_path / "model.gguf", "--dtype", "bf16").code == 0
    with pytest.raises(CheckpointError, match=r"cannot write .*model\.gguf/model\.gguf: "):
        to_gguf(tmp_path / "model", tmp_path / "model.gguf" / "model.gguf")
    small_model("mamba2", dtype=torch.float32).save_pretrained(tmp_path / "odd")
    with pytest.raises(CheckpointError, match="has rows that are no multiple of 32"):
        to_gguf(tmp_path / "odd", tmp_path / "odd.gguf", "q8_0")
    with pytest.raises(CheckpointError, match="exists: name a new file"):
        to_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the process is killed: until the last byte the name is not taken."""
    small_model("mamba2", dtype=torch.float32, hidden_size=32).save_pretrained(tmp_path / "model")
    target, write = tmp_path / "made" / "model.gguf", gguf.GGUFWriter.write_tensors_to_file
    seen: list[bool] = []

    def watched(writer: Any) -> None:
        write(writer)
        seen.append(target.exists())
        if len(seen) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", watched)
    with pytest.raises(KeyboardInterrupt):
        to_gguf(tmp_path / "model", target)
    assert not list(target.parent.iterdir())
    to_gguf(tmp_path / "model", target)
    assert seen == [False, False]
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]
    assert len(gguf.GGUFReader(target).tensors) > 0


def test_without_gguf_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model("mamba2", dtype=torch.float32, hidden_size=32).save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs gguf, which is not installed: pip install '\.\[gguf\]'"):
        to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
