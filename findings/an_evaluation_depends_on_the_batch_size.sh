#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, CPU. A Llama and a Mamba-2 read ten rows, two of 64 tokens and eight of
# 3, padded. Expected: `eval_loss` is the mean over predicted tokens, as the loss of a training step is, however many calls
# make it up: the number of tokens (`num_items_in_batch`) is counted and handed on in both. Seen: an evaluation counts the
# tokens of each batch and then weighs the batches by their rows. The same model on the same rows has another `eval_loss`, and
# so another perplexity, for every `per_device_eval_batch_size`; the loss of a step is the same for all.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
  accelerate==1.15.0 numpy==2.4.6
cd "$here"
env/bin/python -W ignore - <<'PYTHON' 2>/dev/null
import sys

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    Trainer,
    TrainingArguments,
    __version__,
)

torch.manual_seed(0)
size = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
models = {
    "Llama": LlamaForCausalLM(LlamaConfig(**size, **heads)),
    "Mamba-2": Mamba2ForCausalLM(Mamba2Config(**size, num_heads=4, head_dim=16, state_size=16, n_groups=1)),
}
rows = []
for length in (64, 3, 3, 3, 3) * 2:
    labels = torch.full((64,), -100)
    labels[:length] = 7 if length == 64 else 9
    rows.append({"input_ids": labels.clamp_min(0), "labels": labels, "attention_mask": (labels != -100).long()})
quiet = {"output_dir": "out", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
print(f"transformers {__version__}: ten rows, the same weights")
for name, model in models.items():
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    truth = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()))
    evaluations, steps = {}, {}
    for count in (1, 2, 5, 10):
        arguments = TrainingArguments(
            per_device_eval_batch_size=count,
            per_device_train_batch_size=count,
            gradient_accumulation_steps=10 // count,
            max_steps=1,
            learning_rate=0.0,
            logging_steps=1,
            **quiet,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        evaluations[count] = trainer.evaluate()["eval_loss"]
        trainer.train()
        steps[count] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    print(f"  {name:8} mean over predicted tokens {truth:.3f}")
    for what, found in (("eval_loss", evaluations), ("loss of a step", steps)):
        print(f"    {what:15} in batches of", ", ".join(f"{count}: {value:.3f}" for count, value in found.items()))
    if max(abs(value - truth) for value in steps.values()) > 0.01 or abs(evaluations[10] - truth) > 0.01:
        sys.exit("This has changed.")
    if min(abs(evaluations[count] - truth) for count in (1, 2)) < 0.05:
        sys.exit("This has changed.")
PYTHON
