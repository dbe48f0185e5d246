"""Accuracy on multi-query associative recall, and whether the gates pick the queries."""

from typing import TypedDict

import torch
from torch import Tensor

from taipan.data.mqar import IGNORE, MQARMixture
from taipan.errors import InputError
from taipan.generation.mode import inference
from taipan.layers.gating import GateOutput
from taipan.model import TaipanLM
from taipan.ops.gumbel import expected_rate


class MQARGate(TypedDict):
    """What one SAL did with the rows of a setting; all are shares or means over tokens.

    `rate`: selected, without noise; `noisy_rate`: expected under the full Gumbel noise of Eq. 2;
    `queries_selected`: of the queries, those selected; `selected_queries`: of the selected tokens, those that are
    queries (0 if none is selected); `alpha_mean`, `alpha_queries`: mean α of all tokens and of the queries.
    """

    layer: int
    rate: float
    noisy_rate: float
    queries_selected: float
    selected_queries: float
    alpha_mean: float
    alpha_queries: float


class MQARResult(TypedDict):
    """Accuracy of one setting: the share of queries whose value is the model's likeliest token."""

    length: int
    pairs: int
    examples: int
    accuracy: float
    gates: list[MQARGate]


def evaluate_mqar(model: TaipanLM, mixture: MQARMixture, *, seed: int, batch_tokens: int = 16384) -> list[MQARResult]:
    """Run a model over the test settings of a mixture, as at inference; its mode is restored.

    Args:
        model: any, with at least the vocabulary of the mixture.
        mixture: its `test` settings are drawn whole.
        seed: of the test rows.
        batch_tokens: most tokens per forward call (at least one row).

    Returns:
        One JSON-able entry per setting, in order.

    Raises:
        InputError: the mixture's vocabulary is larger than the model's.
    """
    if mixture.vocab_size > model.config.vocab_size:
        raise InputError(
            f"The recall task has {mixture.vocab_size} tokens but the model only {model.config.vocab_size}: "
            "build the model with the vocabulary of the mixture."
        )
    results: list[MQARResult] = []
    device = model.device
    for task in mixture.test:
        tokens_BT, labels_BT = mixture.test_batch(task, seed)
        rows = max(1, batch_tokens // task.length)
        correct = queries = 0
        tallies: list[_GateTally] = []
        for tokens, labels in zip(tokens_BT.split(rows), labels_BT.split(rows), strict=True):
            # the answer to a query stands at the label after it: logits[t] predicts labels[t + 1]
            answer = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], 1).to(device)
            is_query = answer != IGNORE
            with inference(model):
                output = model(tokens.to(device))
                said = model.lm_head(output.hidden_BTD[is_query]).argmax(-1)
            correct += int((said == answer[is_query]).sum())
            queries += said.numel()
            tallies = tallies or [_GateTally(gate.layer) for gate in output.gates]
            for tally, gate in zip(tallies, output.gates, strict=True):
                tally.add(gate, is_query)
        results.append(
            {
                "length": task.length,
                "pairs": task.pairs,
                "examples": task.examples,
                "accuracy": correct / queries,
                "gates": [tally.result() for tally in tallies],
            }
        )
    return results


class _GateTally:
    """Sums over the tokens of one gate."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.sums = torch.zeros(7, dtype=torch.float64)

    def add(self, gate: GateOutput, is_query_BT: Tensor) -> None:
        selected, alpha = gate.selected_BT, gate.alpha_BT
        noisy = expected_rate(gate.scores_BT2, noise=1.0)
        terms = (
            torch.ones_like(alpha),
            is_query_BT,
            selected,
            noisy,
            selected & is_query_BT,
            alpha,
            alpha * is_query_BT,
        )
        self.sums += torch.stack([term.sum(dtype=torch.float64).cpu() for term in terms])

    def result(self) -> MQARGate:
        tokens, queries, selected, noisy, both, alpha, alpha_queries = self.sums.tolist()
        return {
            "layer": self.layer,
            "rate": selected / tokens,
            "noisy_rate": noisy / tokens,
            "queries_selected": both / queries,
            "selected_queries": both / selected if selected else 0.0,
            "alpha_mean": alpha / tokens,
            "alpha_queries": alpha_queries / queries,
        }
