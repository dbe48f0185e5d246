"""One step: accumulation is exact, what is not finite stops before anything moves."""

import dataclasses
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from taipan.config import TaipanConfig
from taipan.errors import TrainingError
from taipan.model import TaipanLM
from taipan.state import DecoderState
from taipan.training.recipe import OptimizerSection
from taipan.training.step.batch import Batch, predicted_tokens
from taipan.training.step.optimizer import OptimizerSet, build_optimizer
from taipan.training.step.train_step import train_step

CONFIG = TaipanConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    layer_types=("mamba2", "selective_attention"),
    mamba_head_dim=8,
    state_size=4,
    sliding_window=8,
)


def rows(count: int, length: int = 12, seed: int = 0) -> Batch:
    """Random tokens; every row has another number of documents and of masked labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CONFIG.vocab_size, (count, length), generator=generator)
    segments = (torch.rand(count, length, generator=generator) < 0.2).cumsum(1)
    masked = torch.rand(count, length, generator=generator) < torch.linspace(0, 0.8, count)[:, None]
    return {"tokens": tokens, "segment_ids": segments, "labels": tokens.masked_fill(masked, -100)}


def split(batch: Batch, sizes: list[int]) -> Iterator[Batch]:
    segments, labels = batch["segment_ids"], batch["labels"]
    assert segments is not None
    parts = zip(batch["tokens"].split(sizes), segments.split(sizes), labels.split(sizes), strict=True)
    for tokens, segment, label in parts:
        yield {"tokens": tokens, "segment_ids": segment, "labels": label}


def fresh(config: TaipanConfig = CONFIG, **section: object) -> tuple[TaipanLM, OptimizerSet]:
    model = TaipanLM(config, generator=torch.Generator().manual_seed(1)).train()
    model.set_progress(1.0)  # no gate noise: a batch and its parts would draw different numbers
    return model, build_optimizer(model, OptimizerSection(**section))  # pyright: ignore[reportArgumentType]


def weights(model: TaipanLM) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_predicted_tokens_are_those_the_model_averages_over() -> None:
    batch = rows(5)
    model, _ = fresh()
    output = model(batch["tokens"], segment_ids=batch["segment_ids"], labels=batch["labels"])
    log_probabilities = output.logits[:, :-1].log_softmax(-1)
    target = batch["labels"][:, 1:]
    segments = batch["segment_ids"]
    assert segments is not None
    counted = (target != -100) & (segments[:, 1:] == segments[:, :-1])
    total = -log_probabilities.gather(-1, target.clamp(min=0)[..., None])[..., 0][counted].sum()
    torch.testing.assert_close(output.cross_entropy, total / predicted_tokens(batch))
    assert predicted_tokens({"tokens": batch["tokens"]}) == 5 * 11


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1, 1], [2, 2, 2], [1, 5]])
def test_accumulated_parts_make_the_step_of_the_whole(sizes: list[int]) -> None:
    # λ = 0: the budget's rate is taken over one forward, so only the cross-entropy can be exact
    config = CONFIG.replace(budget_weight=0.0)
    batch = rows(6)
    results, moved = [], []
    for parts in ([batch], list(split(batch, sizes))):
        model, optimizer = fresh(config, learning_rate=1.0, eps=1.0)
        results.append(train_step(model, optimizer, parts))
        moved.append(weights(model))
    assert results[0].tokens == results[1].tokens == 72
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_budget_per_sequence_accumulates_exactly_too() -> None:
    config = CONFIG.replace(budget_mean="sequence", gate_bias_init=0.1)
    batch = rows(6)
    budgets = []
    for parts in ([batch], list(split(batch, [2, 2, 2]))):
        model, optimizer = fresh(config)
        budgets.append(train_step(model, optimizer, parts).budget)
    assert budgets[0] == pytest.approx(budgets[1], rel=1e-5)
    assert budgets[0] > 0


def test_the_loss_is_the_sum_of_its_parts_and_falls() -> None:
    model, optimizer = fresh(learning_rate=1e-2)
    batch = rows(4)
    results = [train_step(model, optimizer, [batch]) for _ in range(20)]
    assert all(result.loss == pytest.approx(result.cross_entropy + result.budget) for result in results)
    assert results[-1].cross_entropy < 0.7 * results[0].cross_entropy
    assert [gate.layer for gate in results[0].gates] == [1]


def test_the_statistics_are_means_over_the_micro_batches_and_their_budgets_add_up() -> None:
    config = CONFIG.replace(layer_types=("selective_attention", "mamba2", "selective_attention"), gate_bias_init=0.1)
    parts = list(split(rows(6), [2, 2, 2]))
    alone = []
    for part in parts:
        model, optimizer = fresh(config)
        alone.append(train_step(model, optimizer, [part]).gates)
    model, optimizer = fresh(config)
    together = train_step(model, optimizer, parts)
    assert [gate.layer for gate in together.gates] == [0, 2]
    for number, gate in enumerate(together.gates):
        for field in dataclasses.fields(gate):
            mean = sum(getattr(gates[number], field.name) for gates in alone) / 3
            assert getattr(gate, field.name) == pytest.approx(mean), field.name
    assert sum(gate.budget for gate in together.gates) == pytest.approx(together.budget) != 0


def test_a_gate_that_shall_select_nothing_has_no_budget_loss() -> None:
    model, optimizer = fresh(CONFIG.replace(attention_capacity=0.0))
    model.set_progress(0.1)
    result = train_step(model, optimizer, [rows(2)])
    assert result.gates[0].budget == result.budget == 0.0


def test_states_are_read_and_replaced_without_a_gradient_into_the_past() -> None:
    """A step after a state is the step of a model that has read what came before."""
    batch = rows(3, length=24)
    before, after = ({key: part[:, half] for key, part in batch.items()} for half in (slice(0, 12), slice(12, 24)))
    model, optimizer = fresh(learning_rate=1e-9)
    states: list[DecoderState | None] = [None]
    train_step(model, optimizer, [before], states=states)  # pyright: ignore[reportArgumentType]
    (state,) = states
    assert state is not None
    assert not any(tensor.requires_grad for tensor in state.tensors().values())
    with torch.no_grad():
        expected = model(before["tokens"], segment_ids=before["segment_ids"]).state
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(state.tensors()[name], tensor, rtol=1e-5, atol=1e-5)
    carried = train_step(model, optimizer, [after], states=states)  # pyright: ignore[reportArgumentType]
    forgotten = train_step(model, optimizer, [after])  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        whole = model(batch["tokens"], segment_ids=batch["segment_ids"])
        labels = batch["labels"].clone()
        labels[:, :13] = -100
        target = model(batch["tokens"], segment_ids=batch["segment_ids"], labels=labels).cross_entropy
    assert whole.state.position_B.tolist() == states[0].position_B.tolist()  # type: ignore[union-attr]
    assert carried.cross_entropy == pytest.approx(float(target), rel=1e-4)
    assert forgotten.cross_entropy != pytest.approx(float(target), rel=1e-4)


def test_no_state_is_held_through_the_backward_unless_it_is_carried() -> None:
    model, optimizer = fresh()
    batch = rows(3)
    shapes = {layer.ssm_BHPN.shape for layer in model.empty_state(3).layers if hasattr(layer, "ssm_BHPN")}

    def held(part: str) -> None:
        if part == "forward":
            found.append([o for o in gc.get_objects() if type(o) is Tensor and o.shape in shapes])

    for states in (None, [None]):
        found: list[list[Tensor]] = []
        train_step(model, optimizer, [batch], states=states, told=held)
        assert bool(found[0]) == (states is not None)


def test_states_stay_when_a_step_fails() -> None:
    model, optimizer = fresh()
    states: list[DecoderState | None] = [None, None]
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(TrainingError):
        train_step(model, optimizer, [rows(2), rows(2)], states=states)
    assert states == [None, None]


def test_clipping_bounds_the_gradient_and_reports_the_norm_before() -> None:
    batch = rows(4)
    model, optimizer = fresh()
    free = train_step(model, optimizer, [batch], clip=None)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]).norm()
    assert free.grad_norm == pytest.approx(float(norm), rel=1e-5)
    model, optimizer = fresh()
    clipped = train_step(model, optimizer, [batch], clip=free.grad_norm / 10)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]).norm()
    assert clipped.grad_norm == pytest.approx(free.grad_norm, rel=1e-5)
    assert float(norm) == pytest.approx(free.grad_norm / 10, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_weights_and_optimizer_as_they_were(value: float) -> None:
    model, optimizer = fresh()
    batch = rows(4)
    train_step(model, optimizer, [batch])
    with torch.no_grad():
        model.model.norm.weight[3] = value
    before, moments = weights(model), str(optimizer.state_dict())
    with pytest.raises(TrainingError, match=r"step 17.*loss is nan.*finite"):
        train_step(model, optimizer, [batch], step=17)
    assert all(
        torch.equal(
            a,
            b,
        )
        or a.isnan().any()
        or a.isinf().any()
        for a, b in zip(weights(model), before, strict=True)
    )
    assert str(optimizer.state_dict()) == moments
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_stops_even_if_the_loss_is() -> None:
    model, optimizer = fresh()
    parameter = model.model.layers[0].mixer.in_proj.weight
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(model)
    with pytest.raises(TrainingError, match=r"step 3.*gradient is (inf|nan)"):
        train_step(model, optimizer, [rows(4)], step=3)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_keeps_the_weights_in_float32() -> None:
    batch = rows(4)
    results = []
    for dtype in ("float32", "bfloat16"):
        model, optimizer = fresh()
        results.append(train_step(model, optimizer, [batch], dtype=dtype))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert results[0].loss != results[1].loss
    assert results[0].loss == pytest.approx(results[1].loss, rel=0.02)
