"""The Hugging Face model is the native one: the same modules, the same numbers, the same files."""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from taipan import TaipanLM
from taipan.errors import CheckpointError, InputError, StateError
from taipan.hf import TaipanCache, TaipanForCausalLM, TaipanHFConfig
from tests.hf.models import pair, saved
from tests.models import STACKS, VARIANTS, random_tokens, small_config

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((stack, {}) for stack in STACKS),
    *(("taipan", variant) for variant in VARIANTS.values()),
    ("taipan", {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("stack", "overrides"), SETTINGS)
def test_a_native_directory_loads_with_identical_logits_and_back(
    stack: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    native = saved(tmp_path / "native", stack, **overrides)
    face = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert isinstance(face, TaipanForCausalLM)
    assert not face.training
    face.save_pretrained(tmp_path / "face")
    again = TaipanLM.from_pretrained(tmp_path / "face")
    assert again.config == native.config
    assert again.fingerprint == native.fingerprint
    # a single token too: products with one row notice where the weights lie in memory
    for tokens in (random_tokens(2, 19), random_tokens(1, 1)):
        assert torch.equal(face(tokens).logits, native(tokens).logits)
        assert torch.equal(again(tokens).logits, native(tokens).logits)


def test_both_faces_read_trained_weights_with_another_window(tmp_path: Path) -> None:
    ring: dict[str, Any] = {"sliding_window": 4, "key_value_scope": "selected", "window_unit": "selected"}
    native, tokens = saved(tmp_path, "taipan", **ring), random_tokens(1, 60)
    keeping = TaipanLM.from_pretrained(tmp_path, window_eviction="weakest")
    face = AutoModelForCausalLM.from_pretrained(tmp_path, window_eviction="weakest")
    assert torch.equal(face(tokens).logits, keeping(tokens).logits)
    assert not torch.allclose(native(tokens).logits, keeping(tokens).logits)


def test_both_faces_have_the_same_parameter_names() -> None:
    for tie in (True, False):
        native, face = pair(tie_word_embeddings=tie)
        assert dict(native.named_parameters()).keys() == dict(face.named_parameters()).keys()
        assert native.state_dict().keys() == face.state_dict().keys()


def test_bfloat16_keeps_what_the_native_loader_keeps(tmp_path: Path) -> None:
    saved(tmp_path)
    native = TaipanLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    face = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in native.state_dict().items():
        assert face.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(face.state_dict()[name], tensor), name
    assert native.model.layers[0].mixer.A_log.dtype == torch.float32


def test_calibrated_thresholds_travel_with_the_weights(tmp_path: Path) -> None:
    native, _ = pair()
    for number, sal in enumerate(native.sals):
        sal.gate.threshold.fill_(0.25 + number)
    native.save_pretrained(tmp_path)
    face = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [float(face.model.layers[i].mixer.gate.threshold) for i in (1, 3)] == [0.25, 1.25]
    tokens = random_tokens(2, 19)
    for ours, theirs in zip(native(tokens).gates, face(tokens).gates, strict=True):
        assert torch.equal(ours.selected_BT, theirs.selected_BT)


def test_a_new_model_is_drawn_like_a_native_one() -> None:
    config = small_config()
    torch.manual_seed(5)
    native = TaipanLM(config)
    torch.manual_seed(5)
    face = AutoModelForCausalLM.from_config(TaipanHFConfig.from_native(config))
    for name, tensor in native.state_dict().items():
        assert torch.equal(face.state_dict()[name], tensor), name


def test_loss_and_its_parts_are_the_native_ones() -> None:
    native, face = pair()
    tokens = random_tokens(3, 17)
    labels = tokens.clone()
    labels[0, :5] = -100
    mask = torch.ones_like(tokens)
    mask[1, 11:] = 0
    labels[1, 11:] = -100
    for items in (None, 7):
        ours = native(tokens, attention_mask=mask, labels=labels, num_items_in_batch=items)
        theirs = face(tokens, attention_mask=mask, labels=labels, num_items_in_batch=items)
        for part in ("loss", "cross_entropy", "budget"):
            assert torch.equal(getattr(ours, part), getattr(theirs, part)), part


@pytest.mark.parametrize("items", [None, 40])
def test_the_loss_is_that_of_transformers_plus_the_budget(items: int | None) -> None:
    """Against the loss function transformers gives to its own models."""
    _, face = pair()
    tokens = random_tokens(3, 17)
    labels = tokens.clone()
    labels[0, :5] = labels[2, 9:] = -100
    out = face(tokens, labels=labels, num_items_in_batch=items)
    reference = face.loss_function(out.logits, labels, vocab_size=face.config.vocab_size, num_items_in_batch=items)
    share = 1.0 if items is None else float((labels[:, 1:] != -100).sum()) / items
    torch.testing.assert_close(out.loss, reference + out.budget * share, rtol=1e-5, atol=1e-6)


def packed(documents: list[Tensor]) -> Tensor:
    return torch.cat(documents)[None]


@pytest.mark.parametrize("argument", ["segment_ids", "seq_idx", "cu_seq_lens_q", "position_ids"])
def test_packed_documents_are_separate_documents(argument: str) -> None:
    _, face = pair()
    documents = [random_tokens(1, length, seed=length)[0] for length in (5, 1, 9, 12)]
    lengths = torch.tensor([len(document) for document in documents])
    numbers = torch.arange(4).repeat_interleave(lengths)[None]
    description = {
        "segment_ids": numbers,
        "seq_idx": numbers.to(torch.int32),
        "cu_seq_lens_q": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32),
        "position_ids": torch.cat([torch.arange(len(document)) for document in documents])[None],
    }[argument]
    # what DataCollatorWithFlattening sends beside it
    others = {"max_length_q": 12, "max_length_k": 12, "cu_seq_lens_k": description} if "cu" in argument else {}
    together = face(packed(documents), **{argument: description}, **others).logits[0]
    alone = torch.cat([face(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    mixed = face(packed(documents)).logits[0]
    assert not torch.allclose(mixed, alone, rtol=1e-4, atol=1e-4)


def test_position_ids_of_a_left_padded_batch_do_no_harm() -> None:
    _, face = pair()
    tokens = random_tokens(2, 11)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    expected = face(tokens, attention_mask=mask).logits
    torch.testing.assert_close(face(tokens, attention_mask=mask, position_ids=positions).logits, expected)


def test_position_ids_that_run_on_continue_the_document() -> None:
    _, face = pair()
    tokens, positions = random_tokens(2, 15), torch.arange(15)[None]
    whole = face(tokens).logits
    first = face(tokens[:, :8], position_ids=positions[:, :8])
    second = face(tokens[:, 8:], position_ids=positions[:, 8:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-4)


def test_the_cache_continues_as_the_native_state_does() -> None:
    native, face = pair()
    tokens = random_tokens(2, 23)
    cache, state = None, None
    for piece in tokens.split([9, 1, 1, 12], dim=1):
        theirs = face(piece, past_key_values=cache)
        ours = native(piece, state)
        assert torch.equal(theirs.logits, ours.logits)
        cache, state = theirs.past_key_values, ours.state
    assert isinstance(cache, TaipanCache)
    assert cache.get_seq_length() == 23


def test_the_mask_may_cover_the_past() -> None:
    _, face = pair()
    tokens = random_tokens(2, 15)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    whole = face(tokens, attention_mask=mask).logits
    first = face(tokens[:, :8], attention_mask=mask[:, :8])
    second = face(tokens[:, 8:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, whole[:, 8:], rtol=1e-4, atol=1e-4)


def test_training_gives_no_cache_unless_asked() -> None:
    _, face = pair()
    tokens = random_tokens(1, 5)
    assert face(tokens).past_key_values is not None
    assert face(tokens, use_cache=False).past_key_values is None
    face.train()
    assert face(tokens).past_key_values is None
    assert face(tokens, use_cache=True).past_key_values is not None


def test_a_training_step_computes_no_logits_until_they_are_read() -> None:
    _, face = pair()
    face.train()
    tokens = random_tokens(2, 9)
    calls: list[int] = []
    face.lm_head.register_forward_hook(lambda *_: calls.append(1))
    out = face(tokens, labels=tokens)
    assert out["loss"] is out.loss
    assert not calls
    assert out.logits.shape == (2, 9, face.config.vocab_size)
    assert out["logits"] is out.logits
    assert out.to_tuple()[1] is out.logits
    assert len(calls) == 1


def test_tuples_and_kept_logits() -> None:
    _, face = pair()
    tokens = random_tokens(2, 9)
    whole = face(tokens).logits
    (logits, cache, _) = face(tokens, return_dict=False)
    assert torch.equal(logits, whole)
    assert isinstance(cache, TaipanCache)
    assert torch.equal(face(tokens, logits_to_keep=3).logits, whole[:, -3:])


class Adapter(nn.Module):
    """A low-rank adapter, as PEFT wraps a layer: `weight` is that of the layer inside."""

    def __init__(self, base: nn.Module, out_features: int, in_features: int) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(in_features, 2, bias=False)
        self.up = nn.Linear(2, out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


MAMBA_LINEARS = ("mixer.in_proj", "mixer.out_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SAL_LINEARS = ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj", "mixer.gate.hidden", "mixer.gate.proj")
LINEARS = [
    *(f"model.layers.0.{name}" for name in MAMBA_LINEARS),
    *(f"model.layers.1.{name}" for name in SAL_LINEARS),
    "lm_head",
]


def test_every_kind_of_linear_is_in_the_list() -> None:
    _, face = pair(gate="mlp", mamba_mlp=True)
    kinds = {name.split(".", 3)[-1] for name, module in face.named_modules() if isinstance(module, nn.Linear)}
    assert kinds == {name.split(".", 3)[-1] for name in LINEARS}


@pytest.mark.parametrize("name", LINEARS)
def test_an_adapter_around_any_linear_takes_part(name: str) -> None:
    _, face = pair(gate="mlp", mamba_mlp=True)
    tokens = random_tokens(2, 12)
    face.train()
    face.set_progress(0.0)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return face(tokens, labels=tokens).loss

    before = loss()
    base = face.get_submodule(name)
    assert isinstance(base, nn.Linear)
    adapter = Adapter(base, base.out_features, base.in_features)
    parent, _, last = name.rpartition(".")
    setattr(face.get_submodule(parent), last, adapter)
    after = loss()
    assert after != before
    after.backward()
    assert adapter.up.weight.grad is not None
    assert adapter.up.weight.grad.abs().sum() > 0


def test_an_adapter_around_a_convolution_is_refused() -> None:
    _, face = pair()
    mixer: Any = face.model.layers[0].mixer
    mixer.conv1d = Adapter(mixer.conv1d, 1, 1)
    with pytest.raises(InputError, match=r"layers\.0\.mixer\.conv1d is wrapped"):
        face(random_tokens(1, 3))


@pytest.mark.parametrize("name", ["conv1d", "norm"])
def test_adapters_that_an_op_would_pass_by_are_refused(name: str) -> None:
    """peft's own: a gated norm that is tuned, a convolution."""
    from peft import LNTuningConfig, LoraConfig, get_peft_model

    kinds: dict[str, Any] = {
        "conv1d": LoraConfig(r=64, target_modules=["conv1d"]),
        "norm": LNTuningConfig(target_modules=["norm"]),
    }
    _, face = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(face, kinds[name])
    with pytest.raises(InputError, match=rf"layers\.0\.mixer\.{name} is wrapped in a .*leave mixer\.{name} out"):
        adapted(input_ids=random_tokens(1, 3))


@pytest.mark.parametrize("stack", ["taipan", "mamba2", "transformer"])
def test_prefixes_of_keys_and_values_are_refused_for_what_they_are(stack: str) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    model: Any = get_peft_model(pair(stack)[1], PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(StateError, match="Taipan (model )?keeps its state in a TaipanCache"):
        model(input_ids=random_tokens(1, 3))


def test_new_token_ids_after_resizing() -> None:
    for tie in (True, False):
        _, face = pair(tie_word_embeddings=tie)
        vocabulary = face.config.vocab_size
        tokens = random_tokens(1, 6)
        before = face(tokens).logits
        face.resize_token_embeddings(vocabulary + 3, mean_resizing=False)
        torch.testing.assert_close(face(tokens).logits[..., :vocabulary], before)
        assert face(torch.full((1, 2), vocabulary + 2)).logits.shape[-1] == vocabulary + 3
        with pytest.raises(InputError, match=f"{vocabulary + 3} is out of range"):
            face(torch.full((1, 2), vocabulary + 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"output_hidden_states": True}, "output_hidden_states is not supported"),
        ({"inputs_embeds": torch.zeros(1, 4, 24)}, "inputs_embeds is not supported"),
        ({"atention_mask": torch.ones(1, 4)}, "did you mean 'attention_mask'"),
        ({"logits_to_keep": torch.tensor([1])}, "logits_to_keep is a Tensor"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask has shape"),
        ({"cu_seq_lens_q": torch.tensor([0, 2])}, "cu_seq_lens_q ends at 2"),
        ({"input_ids": None}, "input_ids is missing"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    _, face = pair()
    with pytest.raises(InputError, match=message):
        face(**{"input_ids": random_tokens(1, 4), **arguments})


def test_other_caches_are_refused_by_name() -> None:
    from transformers import DynamicCache

    _, face = pair()
    with pytest.raises(StateError, match="past_key_values is a DynamicCache"):
        face(random_tokens(1, 4), past_key_values=DynamicCache())


def test_the_cache_of_another_model_is_refused() -> None:
    _, face = pair()
    _, other = pair(sliding_window=5)
    cache = other(random_tokens(1, 4)).past_key_values
    with pytest.raises(StateError, match="another configuration"):
        face(random_tokens(1, 4), past_key_values=cache)


def test_incomplete_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    native = saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mixer.A_log"
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks weights of model\.layers\.0\.mixer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    native.save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_deep_copy_is_independent() -> None:
    _, face = pair()
    tokens = random_tokens(1, 6)
    before = face(tokens).logits
    other = copy.deepcopy(face)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(face(tokens).logits, before)
    assert not torch.equal(other(tokens).logits, before)


def test_an_op_implementation_can_be_chosen(tmp_path: Path) -> None:
    saved(tmp_path)
    face = AutoModelForCausalLM.from_pretrained(tmp_path, implementation="reference")
    assert set(face.implementations.values()) == {"reference"}


def test_a_head_that_a_checkpoint_has_not_is_refused_for_that_reason(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(InputError, match="has no head of its own: its head is the embedding. Load it as it was saved"):
        AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)  # as the message advises
    tokens = random_tokens(1, 5)
    before = model(tokens).logits
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "untied", tie_word_embeddings=False)
    assert torch.equal(again(tokens).logits, before)
    assert again.lm_head.weight is not again.model.embed_tokens.weight


@pytest.mark.parametrize("device_map", ["auto", {"": "disk"}, {"model": "cpu", "lm_head": "disk"}])
def test_offloading_is_refused_for_what_it_is(device_map: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    little = {"max_memory": {"cpu": "10KB"}} if device_map == "auto" else {}
    with pytest.raises(InputError, match=r"The device map puts layers on .*disk\. Offloading is not supported"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=str(tmp_path / "off"), **little
        )
    assert AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")(random_tokens(1, 3)).logits.isfinite().all()


def test_offloading_by_hand_is_refused_for_what_it_is(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    saved(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(InputError, match=r"model\.layers\.0 are not there .*Offloading is not supported"):
        model(random_tokens(1, 3))
