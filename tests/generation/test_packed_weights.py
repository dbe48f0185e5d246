"""However a weight is changed, the next text is read with what it is now."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taipan import TaipanLM
from taipan.generation import start_decoding
from taipan.generation.program import program_of
from taipan.training.step.muon import Muon
from tests.compilers import needs_kernels
from tests.models import small_model

pytestmark = needs_kernels

STACK = ("mamba2", "selective_attention", "full_attention")
MIXED = {"gate": "mlp", "mamba_mlp": True, "tie_word_embeddings": False}
FORMATS = [
    ("auto", torch.float32),
    ("auto", torch.bfloat16),
    ("bfloat16", torch.float32),
    ("int8", torch.float32),
    ("int4", torch.float32),
]


def new_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> TaipanLM:
    return small_model(STACK, dtype=dtype, seed=seed, **MIXED)


def logits(model: TaipanLM, weights: str = "auto", implementation: str = "native") -> Tensor:
    """What a new text gets after three tokens, which is enough for every weight to matter."""
    decoding = start_decoding(model, model.empty_state(1), weights=weights)
    assert decoding.implementation == implementation
    return torch.cat([decoding.step(torch.tensor([token])) for token in (5, 17, 3)])


def fresh(model: TaipanLM, weights: str) -> Tensor:
    """The same of a model that was never packed before."""
    copy = TaipanLM(model.config).to(next(model.parameters()).dtype).eval()
    copy.load_state_dict(model.state_dict())
    return logits(copy, weights)


def optimized(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[TaipanLM], None]:
    def change(model: TaipanLM) -> None:
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        make(parameters).step()

    return change


def copied_data(model: TaipanLM) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 1.25 + 0.125)


def other_data(model: TaipanLM) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.25 + 0.125


def negated(model: TaipanLM) -> None:
    """Signs only: the upper bit of every number."""
    for parameter in model.parameters():
        parameter.data.neg_()


def loaded(model: TaipanLM) -> None:
    model.load_state_dict({name: tensor * 1.25 for name, tensor in model.state_dict().items()})


def assigned(model: TaipanLM) -> None:
    model.load_state_dict({name: tensor * 1.25 for name, tensor in model.state_dict().items()}, assign=True)


def averaged(model: TaipanLM) -> None:
    """Weights of an exponential moving average, swapped in as values."""
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    average.update_parameters(new_model(next(model.parameters()).dtype, seed=1))
    for own, other in zip(model.parameters(), average.module.parameters(), strict=True):
        own.data, other.data = other.data, own.data


def inside_inference_mode(model: TaipanLM) -> None:
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(1.25).add_(0.125)


def through_numpy(model: TaipanLM) -> None:
    for parameter in model.parameters():
        bits = parameter.detach().view(torch.int16).numpy()
        bits ^= 8


def as_one_vector(model: TaipanLM) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.25, model.parameters())


def on_a_storage(model: TaipanLM) -> None:
    for parameter in model.parameters():
        flat = parameter.untyped_storage()
        torch.tensor([], dtype=parameter.dtype).set_(flat).neg_()


CHANGES: dict[str, Callable[[TaipanLM], None]] = {
    "AdamW, fused": optimized(lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "AdamW, foreach": optimized(lambda p: torch.optim.AdamW(p, 0.1, foreach=True)),
    "AdamW, plain": optimized(lambda p: torch.optim.AdamW(p, 0.1, foreach=False)),
    "SGD, fused": optimized(lambda p: torch.optim.SGD(p, 0.1, fused=True)),
    "Adagrad, fused": optimized(lambda p: torch.optim.Adagrad(p, 0.1, fused=True)),
    "Muon": optimized(lambda p: Muon([{"params": [q for q in p if q.dim() == 2]}], lr=0.1)),
    ".data, copied": copied_data,
    ".data, another": other_data,
    ".data, negated": negated,
    "load_state_dict": loaded,
    "load_state_dict, assigned": assigned,
    "EMA swap": averaged,
    "inference mode": inside_inference_mode,
    "NumPy": through_numpy,
    "vector_to_parameters": as_one_vector,
    "the storage": on_a_storage,
}


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("weights", "dtype"), FORMATS)
def test_every_way_to_change_all_weights_is_seen(weights: str, dtype: torch.dtype, change: str) -> None:
    model = new_model(dtype)
    before = logits(model, weights)
    for _ in range(2):  # a second time too: what was seen once is not taken for what is there
        CHANGES[change](model)
        now = logits(model, weights)
        assert now.equal(fresh(model, weights))
        assert not now.equal(before)
        before = now


@pytest.mark.parametrize(("weights", "dtype"), FORMATS)
def test_one_changed_value_of_any_weight_is_seen(weights: str, dtype: torch.dtype) -> None:
    """Pointed at or copied: no tensor is forgotten, buffers and the last value included."""
    model = new_model(dtype)
    logits(model, weights)
    tensors = model.state_dict()
    assert any("threshold" in name for name in tensors)
    for name, tensor in tensors.items():
        for place in (0, -1):
            tensor.data.flatten()[place] += 2
            assert logits(model, weights).equal(fresh(model, weights)), (name, place)


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_weights_that_are_inference_tensors_are_followed(weights: str) -> None:
    with torch.inference_mode():
        model = new_model()
        assert next(model.parameters()).is_inference()
        before = logits(model, weights)
        copied_data(model)
        now = logits(model, weights)
    assert not now.equal(before)
    assert now.equal(fresh(model, weights))


@pytest.mark.parametrize("weights", ["auto", "bfloat16", "int8"])
def test_a_cast_is_seen_there_and_back(weights: str) -> None:
    model = new_model()
    before = logits(model, weights)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        now = logits(model, weights)
        assert now.equal(fresh(model, weights))
        assert not now.equal(before)


class Adapter(nn.Module):
    """LoRA as libraries do it: a module around a linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.weight = base.weight
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_put_on_and_taken_off_is_seen(merged: bool) -> None:
    model = new_model()
    mixer: Any = model.model.layers[0].mixer
    plain, base = logits(model), mixer.out_proj
    mixer.out_proj = adapter = Adapter(base)
    adapted = logits(model, implementation="model")
    assert not torch.allclose(adapted, plain, atol=1e-3)
    mixer.out_proj = base
    assert logits(model).equal(plain)
    if merged:
        base.weight.data += adapter.up.weight.detach() @ adapter.down.weight.detach()
        torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-3)
        assert logits(model, "int8").equal(fresh(model, "int8"))


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_weights_that_are_not_contiguous_are_followed(weights: str) -> None:
    """They are copied whole, so that a change of any of their values must be seen."""
    model = new_model()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.zeros(*parameter.shape[:1], 2 * parameter.shape[1])[:, ::2].copy_(parameter.data)
    logits(model, weights)
    for parameter in model.parameters():
        parameter.data[-1].neg_()
        assert logits(model, weights).equal(fresh(model, weights))


def test_what_did_not_change_is_not_packed_again() -> None:
    model = new_model()
    for weights in ("auto", "int8"):
        first = program_of(model, weights)
        assert program_of(model, weights) is first
        model.load_state_dict(model.state_dict())
        assert program_of(model, weights) is first


def test_the_digest_is_that_of_the_bytes_whoever_reads_them() -> None:
    """Over more than one block of memory, at any length, by any number of threads."""
    from taipan.native import call
    from taipan.native.fields import array_of
    from taipan.native.interface import Digest, Piece

    def digest(tensor: Tensor) -> int:
        out = torch.empty(1, dtype=torch.int64)
        pieces = array_of(Piece, [Piece.of(address=tensor.data_ptr(), bytes=tensor.nbytes)])
        call(torch.float32, Digest, pieces=pieces, count=1, result=out)
        return int(out)

    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    data = torch.randint(0, 256, (2**21 + 77,), dtype=torch.uint8, generator=generator)
    whole = digest(data)
    seen = {whole}
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert digest(data) == digest(data.clone()) == whole
    finally:
        torch.set_num_threads(threads)
    for place in (0, 7, 63, 64, 2**20 - 1, 2**20, 2**21, len(data) - 1):
        for bit in (1, 128):
            data[place] ^= bit
            seen.add(digest(data))
            data[place] ^= bit
    for length in (0, 1, 63, 64, 65):
        seen.add(digest(data[:length]))
        seen.add(digest(torch.zeros(length, dtype=torch.uint8)))
    assert len(seen) == 1 + 16 + 9  # of no bytes there is one digest
    swapped = data.clone()
    swapped[:8], swapped[64:72] = data[64:72], data[:8]  # the same word, in the same chain, elsewhere
    assert digest(swapped) not in seen
