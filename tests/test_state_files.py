"""A saved state from anywhere: nothing in it reaches the model that a text could not have put there."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from taipan import DecoderState, TaipanLM
from taipan.errors import StateError
from taipan.state import _metadata  # pyright: ignore[reportPrivateUsage]
from tests.models import VARIANTS, random_tokens, small_model

Tensors = dict[str, Tensor]
WINDOW = 7
EVERY_KIND = ("mamba2", "selective_attention", "full_attention", "sliding_attention")
MODELS: dict[str, tuple[str | tuple[str, ...], dict[str, Any]]] = {
    "every kind": (EVERY_KIND, {}),
    "selected-positions": ("taipan", VARIANTS["selected-positions"]),
    "selected-selected": ("taipan", VARIANTS["selected-selected"]),
    "closed": ("taipan", {"attention_capacity": 0.0}),
}
LAYERS = {name: ("layers.",) if name == "every kind" else ("layers.1.",) for name in MODELS}
"""Where tensors are changed: the other layers are as those of every kind."""


class Known:
    """What a state file must know of a model, worked out once for hundreds of files."""

    def __init__(self, model: TaipanLM) -> None:
        self.config, self.fingerprint, self._empty = model.config, model.fingerprint, model.empty_state(0)
        self.state_rules = model.state_rules

    def empty_state(self, batch_size: int) -> DecoderState:
        assert batch_size == 0
        return self._empty


def stored(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def changed_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Shapes, types and values that are nearly right."""
    yield from (tensor[:1], tensor[:0], torch.cat([tensor, tensor]))
    yield tensor.flatten()
    yield tensor[None]
    yield tensor.new_zeros(())
    for place in range(1, tensor.dim()):
        yield tensor.narrow(place, 0, max(0, tensor.shape[place] - 1))
        yield torch.cat([tensor, tensor], place)
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64):
        if dtype != tensor.dtype:
            yield tensor.to(dtype)
    values = (0, 1, -1, 7, 2**31, -(2**31), 2**62, -(2**63), 2**63 - 1)
    if tensor.is_floating_point():
        values = (float("nan"), float("inf"), -float("inf"), 1e30, -1.0)
    for value in values:
        yield torch.full_like(tensor, value)
        one = tensor.clone()
        if one.numel():
            one.view(-1)[-1] = value
            yield one


def changed_files(tensors: Tensors, layers: tuple[str, ...]) -> Iterator[tuple[str, Tensors]]:
    """Every tensor (of these layers) changed in every way, left out, or renamed; one more beside them."""
    for name, tensor in tensors.items():
        if name.startswith("layers.") and not name.startswith(layers):
            continue
        rest = {other: value for other, value in tensors.items() if other != name}
        for other in map(Tensor.contiguous, changed_tensors(tensor)):
            if other.shape != tensor.shape or other.dtype != tensor.dtype or not torch.equal(other, tensor):
                yield name, {**rest, name: other}
        yield name, rest
        yield name, {**rest, f"{name}x": tensor}
    yield "more", {**tensors, "more": torch.zeros(1)}


def saved(tmp_path: Path, name: str) -> tuple[TaipanLM, Path]:
    stack, values = MODELS[name]
    model, path = small_model(stack, dtype=torch.float32, **values), tmp_path / "state.safetensors"
    with torch.no_grad():
        state = model(random_tokens(2, 12)).state
        model(random_tokens(1, 3, 1), state=state.select(torch.tensor([1]))).state.save(tmp_path / "one", model)
    state.save(path, model)
    assert DecoderState.load(tmp_path / "one", model).batch_size == 1
    return model, path


@pytest.mark.parametrize("name", MODELS)
def test_no_changed_tensor_is_taken(name: str, tmp_path: Path) -> None:
    model, path = saved(tmp_path, name)
    known = Known(model)
    tensors, metadata = stored(path)
    cases = 0
    for changed, values in changed_files(tensors, LAYERS[name]):
        save_file(values, path, metadata)
        with pytest.raises(StateError, match=r"state\.safetensors") as error:
            DecoderState.load(path, known)
            pytest.fail(f"{changed} was taken as {values.get(changed)}")
        assert len(str(error.value)) < 600
        cases += 1
    assert cases >= (350 if name == "every kind" else 100)
    save_file(dict(reversed(tensors.items())), path, metadata)  # the same in another order
    DecoderState.load(path, model)


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("name", ["every kind", "selected-positions"])
@torch.no_grad()
def test_a_forged_checksum_lets_only_numbers_pass(name: str, tmp_path: Path) -> None:
    """Whoever makes a file can make its checksum: then shapes, types and indices alone stand before the kernels."""
    model, path = saved(tmp_path, name)
    known = Known(model)
    tensors, _ = stored(path)
    passed = 0
    for changed, values in changed_files(tensors, LAYERS[name]):
        save_file(values, path, _metadata(values, known.config, known.fingerprint))
        try:
            state = DecoderState.load(path, known)
        except StateError:
            continue
        passed += 1
        assert changed in ("segment_B", "position_B") or values[changed].is_floating_point(), (changed, values[changed])
        for part, tensor in state.tensors().items():
            assert tensor.shape == tensors[part].shape
            assert tensor.dtype == tensors[part].dtype
        assert model(random_tokens(2, 3), state=state).logits.shape == (2, 3, 61)
        assert model(random_tokens(2, 1), state=state).logits.shape == (2, 1, 61)
    assert passed  # the numbers of another text, which nothing can tell


@pytest.mark.parametrize("name", ["selected-positions", "every kind"])
def test_indices_that_no_text_gives_are_refused(name: str, tmp_path: Path) -> None:
    """In range, but not where the ring has them: an entry of the future, two of one place, an order turned round."""
    model, path = saved(tmp_path, name)
    tensors, _ = stored(path)
    index = tensors["layers.1.index_BW"]
    count = int(tensors["layers.1.count_B"][0])
    assert count >= 2  # two entries to exchange
    newest = (count - 1) % WINDOW
    older = (count - 2) % WINDOW

    def with_entry(slot: int, value: int) -> Tensor:
        other = index.clone()
        other[0, slot] = value
        return other

    exchanged = with_entry(newest, int(index[0, older]))
    exchanged[0, older] = index[0, newest]
    for other in (
        exchanged,
        with_entry(newest, 12),
        with_entry(newest, int(index[0, older])),
        with_entry(newest, -1),
        with_entry(older, -2),
        index + 1,
        index.roll(1, 1),
    ):
        values = {**tensors, "layers.1.index_BW": other}
        save_file(values, path, _metadata(values, model.config, model.fingerprint))
        with pytest.raises(StateError, match=r"layers\.1\.index_BW"):
            DecoderState.load(path, model)


def test_no_changed_metadata_is_taken(tmp_path: Path) -> None:
    model, path = saved(tmp_path, "every kind")
    tensors, metadata = stored(path)
    changes: list[Callable[[str], str]] = [
        str.upper,
        lambda v: v[:-1],
        lambda v: v + "0",
        lambda v: "",
        lambda v: "x" * 10**5,
    ]
    for name, value in metadata.items():
        for change in changes:
            save_file(tensors, path, {**metadata, name: change(value)})
            with pytest.raises(StateError, match=r"state\.safetensors") as error:
                DecoderState.load(path, model)
            assert len(str(error.value)) < 500
        for other in ({name: None}, {name: None, f"{name}x": value}):
            kept = {key: text for key, text in {**metadata, **other}.items() if text is not None}
            save_file(tensors, path, kept)
            with pytest.raises(StateError, match=r"state\.safetensors"):
                DecoderState.load(path, model)
    save_file(tensors, path, {**metadata, "comment": "mine"})
    with pytest.raises(StateError, match="was changed after it was saved"):
        DecoderState.load(path, model)
    save_file(tensors, path, {**metadata, "format": "taipan-state-2"})
    with pytest.raises(StateError, match="by an earlier version"):
        DecoderState.load(path, model)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = small_model("taipan", dtype=torch.float32)
    with torch.no_grad():
        state = model(random_tokens(1, 3)).state
    with pytest.raises(StateError, match=r"This state cannot be .* layers\.0\.conv_BLC holds a number that is not fin"):
        state.map(lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t).save(tmp_path / "s", model)
    assert not (tmp_path / "s").exists()
