"""Accuracy and selection on the recall task, for models whose answers are known."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from taipan import TaipanLM
from taipan.data.mqar import MQARMixture, MQARTask
from taipan.errors import InputError
from taipan.evaluation import evaluate_mqar
from tests.models import force_gates, small_model

VOCAB = 64
TASKS = (MQARTask(16, 4, 12), MQARTask(40, 8, 7))
MIXTURE = MQARMixture(VOCAB, train=TASKS, test=TASKS)


def model(**options: Any) -> TaipanLM:
    return small_model(("mamba2", "selective_attention"), vocab_size=VOCAB, **options)


def lookup(tokens_BT: Tensor, pairs: int, wrong: int) -> Tensor:
    """The value of every key by looking it up; for `wrong` keys of each row another token."""
    answer = torch.zeros_like(tokens_BT)
    for b, row in enumerate(tokens_BT.tolist()):
        values = {row[2 * n]: (row[2 * n + 1] if n >= wrong else 0) for n in range(pairs)}
        answer[b] = torch.tensor([values.get(token, 0) for token in row])
    return answer


@pytest.mark.parametrize("wrong", [0, 1, 4])
def test_accuracy_is_the_share_of_right_values_at_the_queries(wrong: int) -> None:
    teller = small_model("mamba2", vocab_size=VOCAB, hidden_size=VOCAB, tie_word_embeddings=False)
    with torch.no_grad():
        teller.lm_head.weight.copy_(torch.eye(VOCAB))

    def forward(tokens_BT: Tensor) -> Any:
        pairs = next(task.pairs for task in TASKS if task.length == tokens_BT.shape[1])
        hidden = torch.nn.functional.one_hot(lookup(tokens_BT, pairs, wrong), VOCAB).double()
        return SimpleNamespace(hidden_BTD=hidden, gates=())

    teller.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    results = evaluate_mqar(teller, MIXTURE, seed=1)
    assert [(r["length"], r["pairs"], r["examples"]) for r in results] == [(16, 4, 12), (40, 8, 7)]
    for result in results:
        assert result["accuracy"] == pytest.approx(1 - wrong / result["pairs"])


def test_batches_do_not_matter() -> None:
    whole, single = (evaluate_mqar(model(), MIXTURE, seed=1, batch_tokens=n) for n in (10**6, 1))
    for left, right in zip(whole, single, strict=True):
        assert left["accuracy"] == right["accuracy"]
        assert left["gates"][0] == pytest.approx(right["gates"][0])


@pytest.mark.parametrize("margin", [-3.0, 3.0])
def test_gates_that_are_all_open_or_all_closed(margin: float) -> None:
    forced = model()
    force_gates(forced, margin=margin)
    share = torch.sigmoid(torch.tensor(margin)).item()
    for result in evaluate_mqar(forced, MIXTURE, seed=1):
        (gate,) = result["gates"]
        assert gate["layer"] == 1
        assert gate["rate"] == gate["queries_selected"] == (1.0 if margin > 0 else 0.0)
        assert gate["selected_queries"] == pytest.approx(result["pairs"] / result["length"] if margin > 0 else 0.0)
        assert gate["noisy_rate"] == pytest.approx(share)
        assert gate["alpha_mean"] == pytest.approx(share)
        assert gate["alpha_queries"] == pytest.approx(share)


def test_gate_statistics_by_hand() -> None:
    gated = model()
    (result, _) = evaluate_mqar(gated, MIXTURE, seed=1)
    tokens, labels = MIXTURE.test_batch(TASKS[0], 1)
    query = torch.zeros_like(labels, dtype=torch.bool)
    query[:, :-1] = labels[:, 1:] != -100
    with torch.no_grad():
        gate = gated(tokens).gates[0]
    selected, alpha = gate.selected_BT.double(), gate.alpha_BT
    assert 0 < selected.mean() < 1
    assert result["gates"][0] == pytest.approx(
        {
            "layer": 1,
            "rate": float(selected.mean()),
            "noisy_rate": float(gate.margin_BT.sigmoid().mean()),
            "queries_selected": float(selected[query].mean()),
            "selected_queries": float((selected * query).sum() / selected.sum()),
            "alpha_mean": float(alpha.mean()),
            "alpha_queries": float(alpha[query].mean()),
        }
    )
    json.dumps(result)


def test_the_model_is_left_in_its_mode_and_runs_without_noise() -> None:
    noisy = model(gumbel_noise_end=1.0).train()
    assert evaluate_mqar(noisy, MIXTURE, seed=1) == evaluate_mqar(noisy, MIXTURE, seed=1)
    assert noisy.training


def test_a_larger_vocabulary_than_the_models_is_refused() -> None:
    with pytest.raises(InputError, match="64 tokens but the model only 61"):
        evaluate_mqar(small_model("mamba2"), MIXTURE, seed=1)
