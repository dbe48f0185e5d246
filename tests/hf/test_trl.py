"""The trainers of TRL, as a user writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from taipan.data.tokenizer import Tokenizer
from taipan.hf import TaipanForCausalLM, prepare_trainer
from tests.models import small_model

# importing TRL takes seconds, and so does most of what it does; test_backbone.py and test_trainer_counts.py have the
# quick representatives
pytestmark = pytest.mark.slow

TEXTS = ["one two three", "a longer text, with more in it", "x", "another one"]
PAIRS = {
    "prompt": ["hello ", "what is "] * 4,
    "chosen": ["world", "this thing"] * 4,
    "rejected": ["w", "no, this is another thing"] * 4,
}
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}Assistant: {% generation %}{{ message.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}User: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 257, "eos_token_id": 256, "budget_weight": 30.0}
    small_model(dtype=torch.float32, **sizes).save_pretrained(directory, Tokenizer.bytes())
    return str(directory)


def tokenizer(directory: str) -> Any:
    made = AutoTokenizer.from_pretrained(directory)
    made.chat_template = TEMPLATE
    return made


def options(directory: Path, **others: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    return {**settings, **others}


def sft(model: Any, directory: str, out: Path, rows: dict[str, Any] | None = None, **others: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    adapter = others.pop("peft_config", None)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**options(out, **others)),
        train_dataset=Dataset.from_dict(rows or {"text": TEXTS}),
        processing_class=tokenizer(directory),
        peft_config=adapter,
    )


def own_loss(model: TaipanForCausalLM, documents: list[dict[str, list[int]]]) -> Tensor:
    """Mean cross-entropy over the labels of documents that are read one by one."""
    losses: list[Tensor] = []
    for document in documents:
        tokens, labels = (torch.tensor([document[name]]) for name in ("input_ids", "labels"))
        logits = model(tokens).logits[0, :-1]
        losses.append(F.cross_entropy(logits, labels[0, 1:], reduction="none")[labels[0, 1:] != -100])
    return torch.cat(losses).mean()


FORMS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "padding-free": (None, {"padding_free": True, "max_length": None}),
    "bfd": (None, {"packing": True, "packing_strategy": "bfd", "max_length": 64}),
    "bfd_split": (None, {"packing": True, "packing_strategy": "bfd_split", "max_length": 64}),
    "completion-only": ({"prompt": PAIRS["prompt"][:4], "completion": PAIRS["chosen"][:4]}, {}),
    "assistant-only": (
        {
            "messages": [
                [{"role": "user", "content": text}, {"role": "assistant", "content": text[:3]}] for text in TEXTS
            ]
        },
        {"assistant_only_loss": True},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_packed_is_padded_is_alone_and_the_end_is_learnt(form: str, directory: str, tmp_path: Path) -> None:
    rows, settings = FORMS[form]
    model = TaipanForCausalLM.from_pretrained(directory)
    run = sft(model, directory, tmp_path, rows, **settings)
    alone = sft(
        model, directory, tmp_path, rows, **FORMS["assistant-only" if rows and "messages" in rows else "plain"][1]
    )
    documents = list(alone.train_dataset)
    ends = {document["labels"][-1] for document in documents}
    assert ends == {256}, "the last thing to be learnt of every example is its end"
    model.eval()
    found: list[Tensor] = []
    for batch in run.get_train_dataloader():
        found.append(run.compute_loss(model, dict(batch)).detach())
    assert len(found) == 1
    torch.testing.assert_close(found[0], own_loss(model, documents).detach(), rtol=1e-4, atol=1e-4)
    run.train()
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in run.state.log_history if "loss" in log)


def test_wrapped_packing_reads_on_as_it_says(directory: str, tmp_path: Path) -> None:
    model = TaipanForCausalLM.from_pretrained(directory).eval()
    run = sft(model, directory, tmp_path, packing=True, packing_strategy="wrapped", max_length=16)
    batch = next(iter(run.get_train_dataloader()))
    found = run.compute_loss(model, dict(batch))
    documents = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in run.train_dataset]
    torch.testing.assert_close(found, own_loss(model, documents[:4]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["plain", "padding-free", "bfd"])
def test_the_gradient_of_sft_is_that_of_the_loss_with_its_budget(form: str, directory: str, tmp_path: Path) -> None:
    model = TaipanForCausalLM.from_pretrained(directory)
    run = sft(model, directory, tmp_path, FORMS[form][0], **FORMS[form][1])
    batch = dict(next(iter(run.get_train_dataloader())))
    gradients: list[dict[str, Tensor]] = []
    for own in (True, False):
        torch.manual_seed(1)
        model.train()
        model.zero_grad()
        (model.forward(**batch).loss if own else run.compute_loss(model, dict(batch))).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def dpo(model: Any, directory: str, out: Path, **others: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=model,
        args=DPOConfig(**options(out, **others)),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer(directory),
    )


def kto(model: Any, directory: str, out: Path, **others: Any) -> Any:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False] * 4}
    return KTOTrainer(
        model=model,
        args=KTOConfig(**options(out, **others)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(directory),
    )


def lengths(completions: list[str], **_: Any) -> list[float]:
    """Reward of an answer."""
    return [float(len(completion)) for completion in completions]


def grpo(model: Any, directory: str, out: Path, **others: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer(
        model=model,
        reward_funcs=lengths,
        args=GRPOConfig(**options(out, num_generations=2, max_completion_length=8, **others)),
        train_dataset=Dataset.from_dict({"prompt": PAIRS["prompt"]}),
        processing_class=tokenizer(directory),
    )


def rloo(model: Any, directory: str, out: Path, **others: Any) -> Any:
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    return RLOOTrainer(
        model=model,
        reward_funcs=lengths,
        args=RLOOConfig(**options(out, num_generations=2, max_completion_length=8, **others)),
        train_dataset=Dataset.from_dict({"prompt": PAIRS["prompt"]}),
        processing_class=tokenizer(directory),
    )


def reward(model: Any, directory: str, out: Path, **others: Any) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    head = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1)
    return RewardTrainer(
        model=head,
        args=RewardConfig(**options(out, **others)),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer(directory),
    )


@pytest.mark.parametrize("make", [dpo, kto, grpo, rloo, reward])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_trains_and_holds_the_budget(
    make: Callable[..., Any], accumulation: int, directory: str, tmp_path: Path
) -> None:
    """The weight of the budget is large: it moves the gates, whatever the loss is."""
    model = TaipanForCausalLM.from_pretrained(directory)
    run = make(model, directory, tmp_path, gradient_accumulation_steps=accumulation, max_steps=6)
    if accumulation > 1:
        prepare_trainer(run)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    probe = torch.tensor([Tokenizer.bytes().encode("what is this thing, and no other? " * 8)])

    def miss() -> float:
        with torch.no_grad():
            gates = run.model.eval().model(input_ids=probe).gates
        return sum(abs(float(gate.noise_free_rate) - run.model.config.attention_capacity) for gate in gates)

    first = miss()
    run.train()
    assert miss() < first
    changed = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"model.layers.1.mixer.gate.proj.weight", "model.layers.0.mixer.in_proj.weight"} <= changed


def test_log_probabilities_are_equal_at_any_padding(directory: str, tmp_path: Path) -> None:
    model = TaipanForCausalLM.from_pretrained(directory).eval()
    run = dpo(model, directory, tmp_path)
    batch = dict(next(iter(run.get_train_dataloader())))
    tokens, mask, completion = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    labels = tokens.masked_fill(completion == 0, -100)

    def sums(tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            output = run.model(input_ids=tokens, attention_mask=mask, labels=labels, fused_lm_head=True)
        return output.log_probs.sum(-1)

    expected = sums(tokens, mask, labels)
    more = [F.pad(part, (0, 7), value=fill) for part, fill in ((tokens, 0), (mask, 0), (labels, -100))]
    torch.testing.assert_close(sums(*more), expected, rtol=1e-4, atol=1e-4)
    left = [part.clone() for part in (tokens, mask, labels)]
    for row, length in enumerate(mask.sum(1).tolist()):
        for part in left:
            part[row] = part[row].roll(part.shape[1] - length)
    torch.testing.assert_close(sums(*left), expected, rtol=1e-4, atol=1e-4)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = sums(tokens[row : row + 1, :length], mask[row : row + 1, :length], labels[row : row + 1, :length])
        torch.testing.assert_close(alone, expected[row : row + 1], rtol=1e-4, atol=1e-4)


def test_a_model_may_be_given_as_a_path(directory: str, tmp_path: Path) -> None:
    run = sft(directory, directory, tmp_path)
    assert isinstance(run.model, TaipanForCausalLM)
    run.train()


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_adapters_learn_in_every_linear_and_nothing_else_moves(
    kind: dict[str, bool], directory: str, tmp_path: Path
) -> None:
    from peft import LoraConfig

    model = TaipanForCausalLM.from_pretrained(directory)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapter = LoraConfig(r=4, target_modules="all-linear", **kind)
    run = sft(model, directory, tmp_path, peft_config=adapter, max_steps=3, bf16=False)
    run.train()
    wrapped = dict(run.model.named_parameters())
    ups = [parameter for name, parameter in wrapped.items() if "lora_B" in name]
    assert len(ups) >= 4
    assert all(bool(parameter.any()) for parameter in ups)
    for name, parameter in wrapped.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain in before:
            assert torch.equal(parameter, before[plain]), name
    tokens = torch.tensor([Tokenizer.bytes().encode("one two")])
    tuned = run.model.eval()(input_ids=tokens).logits
    merged = run.model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, tuned, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(tuned, TaipanForCausalLM.from_pretrained(directory)(tokens).logits)
