#!/usr/bin/env bash
# transformers 5.23.0, schedulefree 1.4.1, torch 2.13.0, CPU. `Trainer(optim="schedule_free_adamw")`: an optimizer of two sets of
# weights, one where gradients are taken and one that is the model, their average. Expected: what is evaluated is what is saved, in
# checkpoints and at the end. Seen: `evaluate` looks at the average; checkpoints and `save_model` hold the weights where the
# next gradient would be taken, with another loss, unless an evaluation came right before. So the same training saves
# another model when `eval_strategy` is set. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
  accelerate==1.15.0 schedulefree==1.4.1 numpy==2.4.6
cd "$here"
HF_HUB_OFFLINE=1 env/bin/python -W ignore - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
following = torch.rand(32, 32).pow(8)  # texts of a chain: what follows depends on the token before


def text():
    ids = [int(torch.randint(32, ()))]
    while len(ids) < 32:
        ids.append(int(torch.multinomial(following[ids[-1]], 1)))
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}


train, held_out = [text() for _ in range(256)], [text() for _ in range(64)]
config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


def run(name, optimizer, **evaluation):
    torch.manual_seed(1)
    arguments = TrainingArguments(
        output_dir=name, optim=optimizer, learning_rate=0.03, lr_scheduler_type="constant", max_steps=100, save_steps=100,
        per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1000, **evaluation,
    )
    model = LlamaForCausalLM(config)
    trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=held_out)
    sys.stdout = sys.stderr  # what Trainer prints
    trainer.train()
    trainer.save_model(f"{name}/last")
    evaluated = trainer.evaluate()["eval_loss"]
    sys.stdout = sys.__stdout__
    ids = torch.stack([one["input_ids"] for one in held_out])
    losses = {"evaluated": evaluated}
    for place in ("checkpoint-100", "last"):
        saved = LlamaForCausalLM.from_pretrained(f"{name}/{place}").eval()
        with torch.no_grad():
            losses[place] = float(saved(input_ids=ids, labels=ids).loss)
    return losses


print(f"transformers {version('transformers')}, schedulefree {version('schedulefree')}: loss on texts that were held out")
seen = {}
for name, optimizer, evaluation in (
    ("schedule-free", "schedule_free_adamw", {}),
    ("schedule-free, evaluated before it saves", "schedule_free_adamw", {"eval_strategy": "steps", "eval_steps": 100}),
    ("AdamW", "adamw_torch", {}),
):
    seen[name] = run(f"run{len(seen)}", optimizer, **evaluation)
    print(f"  {name:40} " + ", ".join(f"{what} {loss:.3f}" for what, loss in seen[name].items()))
apart, together, adamw = seen.values()
if not all(abs(apart[place] - apart["evaluated"]) > 0.005 for place in ("checkpoint-100", "last")):
    sys.exit("This has changed.")
if not all(abs(loss - losses["evaluated"]) < 1e-4 for losses in (together, adamw) for loss in losses.values()):
    sys.exit("This has changed.")
PYTHON
