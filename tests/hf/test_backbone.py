"""The decoder as transformers and TRL call a base model; the budget in losses that others compute."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.state
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from taipan.errors import InputError
from taipan.hf import TaipanForCausalLM, TaipanForSequenceClassification, TaipanModel
from taipan.hf.backbone import TrainerLink
from tests.hf.models import pair, saved
from tests.models import random_tokens


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("stack", ["taipan", "mamba2"])
def test_the_base_model_takes_keywords_and_gives_hidden_states(stack: str) -> None:
    _, face = pair(stack)
    tokens, mask = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    hidden = face.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(face.lm_head(hidden), face(tokens, attention_mask=mask).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("budget_mean", ["batch", "sequence"])
def test_a_loss_that_others_compute_has_the_gradient_of_the_budget(budget_mean: str, checkpointing: bool) -> None:
    """As TRL does it: hidden states of the base model, times the head."""
    _, face = pair(budget_weight=30.0, budget_mean=budget_mean)
    face.train()
    if checkpointing:
        face.activation_checkpointing_enable()
    tokens = random_tokens(3, 17)
    torch.manual_seed(1)
    whole = face(tokens, labels=tokens)
    whole.loss.backward()
    expected = gradients(face)
    torch.manual_seed(1)
    hidden = face.base_model(input_ids=tokens).last_hidden_state
    loss = F.cross_entropy(face.lm_head(hidden[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, whole.cross_entropy)
    loss.backward()
    found = gradients(face)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_loss_from_logits_without_labels_has_it_too() -> None:
    _, face = pair(budget_weight=30.0)
    face.train()
    tokens = random_tokens(3, 17)
    (face(tokens).logits * 0).sum().backward()
    assert gradients(face)["model.layers.1.mixer.gate.proj.weight"].abs().sum() > 0


@pytest.mark.parametrize("how", ["eval", "no_grad", "no budget", "threshold"])
def test_the_budget_rides_along_in_training_only(how: str) -> None:
    settings: dict[str, Any] = {"budget_weight": 0.0 if how == "no budget" else 30.0}
    if how == "threshold":
        settings["budget_control"] = "threshold"
    _, face = pair(**settings)
    face.train(how != "eval")
    with torch.set_grad_enabled(how != "no_grad"):
        hidden = face.base_model(input_ids=random_tokens(3, 17)).last_hidden_state
    if how != "no_grad":
        (hidden * 0).sum().backward()
        assert not any(gradient.any() for gradient in gradients(face).values())


def test_accumulating_takes_the_budget_of_the_last_call_where_nobody_says_how_many_there_are() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    _, face = pair(budget_weight=30.0)
    face.train()
    loader = accelerator.prepare_data_loader(torch.utils.data.DataLoader(list(random_tokens(2, 17)), batch_size=1))
    found: list[bool] = []
    for number, tokens in enumerate(loader):
        accelerator.gradient_state._set_sync_gradients(number == 1)  # as Trainer does it
        (face.base_model(input_ids=tokens).last_hidden_state * 0).sum().backward()
        found.append(any(bool(gradient.any()) for gradient in gradients(face).values()))
    assert found == [False, True]


def test_a_loss_that_others_scale_is_refused_unless_its_trainer_says_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 in Accelerate, which it refuses itself on a CPU."""
    monkeypatch.setattr(accelerate.state, "is_initialized", lambda: True)
    monkeypatch.setattr(accelerate.state, "AcceleratorState", lambda: SimpleNamespace(mixed_precision="fp16"))
    _, face = pair(budget_weight=30.0)
    tokens = random_tokens(1, 9)
    with pytest.raises(InputError, match=r"in float16, whose scale is unknown here.*prepare_trainer\(trainer\)"):
        _ = face.train().model(input_ids=tokens).last_hidden_state
    face.model.link = TrainerLink(share=1024.0)
    face.model(input_ids=tokens).last_hidden_state.sum().backward()
    assert gradients(face)["model.layers.1.mixer.gate.proj.weight"].abs().sum() > 0


def test_checkpointed_activations_give_the_same_gradients_to_the_bit() -> None:
    _, face = pair()
    face.train()
    tokens = random_tokens(2, 17)
    found: list[dict[str, Tensor]] = []
    for on in (False, True):
        if on:
            face.activation_checkpointing_enable({"use_reentrant": False})
        assert face.is_activation_checkpointing == on
        torch.manual_seed(1)
        face(tokens, labels=tokens).loss.backward()
        found.append(gradients(face))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name
    with pytest.raises(InputError, match="use_cache is True, but in training with activation checkpointing"):
        face(tokens, use_cache=True)
    assert face.eval()(tokens).past_key_values.get_seq_length() == 17
    face.train()
    face.activation_checkpointing_disable()
    assert not face.is_activation_checkpointing
    assert face(tokens, use_cache=True).past_key_values is not None


def test_every_second_block_can_be_checkpointed_and_nothing_be_offloaded() -> None:
    _, face = pair()
    face.activation_checkpointing_enable(every_n_layers=2)
    assert [layer.recompute for layer in face.model.layers] == [True, False, True, False]
    reentrant: dict[str, Any] = {"activation_checkpointing_kwargs": {"use_reentrant": True}}
    offload: dict[str, Any] = {"offload": True}
    for arguments, name in ((offload, "offload"), (reentrant, "use_reentrant")):
        with pytest.raises(InputError, match=f"{name} is not supported in Taipan's activation checkpointing"):
            face.activation_checkpointing_enable(**arguments)


def test_auto_model_is_the_decoder(tmp_path: Path) -> None:
    native = saved(tmp_path / "native")
    tokens = random_tokens(2, 9)
    model = AutoModel.from_pretrained(tmp_path / "native")
    assert isinstance(model, TaipanModel)
    out = model(tokens)
    assert torch.equal(native.lm_head(out.last_hidden_state), native(tokens).logits)
    more = random_tokens(2, 3, seed=5)
    second = model(more, past_key_values=out.past_key_values)
    assert second.past_key_values is out.past_key_values  # in place, as with every base model of transformers
    assert out.past_key_values.get_seq_length() == 12
    again = second.last_hidden_state
    expected = model(torch.cat([tokens, more], 1)).last_hidden_state[:, 9:]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    (hidden, _, gates) = model(tokens, return_dict=False)
    assert torch.equal(hidden, out.last_hidden_state)
    assert len(gates) == 2
    model.save_pretrained(tmp_path / "decoder")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "decoder")(tokens).last_hidden_state, hidden)


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_a_classifier_reads_the_last_real_token_of_each_row(tie_word_embeddings: bool, tmp_path: Path) -> None:
    saved(tmp_path / "native", tie_word_embeddings=tie_word_embeddings)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "native", num_labels=3)
    assert isinstance(model, TaipanForSequenceClassification)
    assert 0 < model.score.weight.abs().sum() < 100
    rows = [random_tokens(1, length, seed=length) for length in (5, 9, 2)]
    alone = torch.cat([model(row).logits for row in rows])
    for side in ("left", "right"):
        pads = [(9 - row.shape[1], 0) if side == "left" else (0, 9 - row.shape[1]) for row in rows]
        tokens = torch.cat([F.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
        mask = torch.cat([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])
        out = model(input_ids=tokens, attention_mask=mask, labels=torch.tensor([0, 2, 1]))
        torch.testing.assert_close(out.logits, alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.loss, F.cross_entropy(alone, torch.tensor([0, 2, 1])), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again(rows[0]).logits, model(rows[0]).logits)
    with pytest.raises(InputError, match="A row holds several documents"):
        model(rows[0], position_ids=torch.tensor([[0, 1, 0, 1, 2]]))


def test_the_padding_token_ends_a_row_without_a_mask(tmp_path: Path) -> None:
    saved(tmp_path, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    tokens = 1 + random_tokens(1, 5) % 60
    torch.testing.assert_close(model(F.pad(tokens, (0, 3))).logits, model(tokens).logits)


def test_heads_keep_the_decoder_of_a_language_model(tmp_path: Path) -> None:
    saved(tmp_path)
    model = TaipanForCausalLM.from_pretrained(tmp_path)
    for kind in (AutoModel, AutoModelForSequenceClassification):
        other = kind.from_pretrained(tmp_path)
        for name, tensor in model.model.state_dict().items():
            assert torch.equal(other.model.state_dict()[name], tensor), name
