#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, CPU. A model in bfloat16 is trained by `Trainer(optim="adafactor")`, which keeps its running
# averages in float32. Expected: resumed from a checkpoint, which holds them in float32, it ends with the weights of the run that
# was not interrupted, as it does with AdamW or in float32. Seen: `Optimizer.load_state_dict` of torch turns what it loads into
# the type of the weights, here bfloat16, so that the averages lose 16 of 24 bits, and the resumed run ends with other weights.
# No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
  accelerate==1.15.0 numpy==2.4.6
cd "$here"
HF_HUB_OFFLINE=1 env/bin/python -W ignore - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
texts = [{"input_ids": (ids := torch.randint(0, 32, (16,)).cumsum(0) % 32), "labels": ids} for _ in range(64)]
config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


def weights(name, optimizer, dtype, resume=None):
    torch.manual_seed(1)
    arguments = TrainingArguments(
        output_dir=name, optim=optimizer, learning_rate=0.01, max_steps=20, save_steps=10, per_device_train_batch_size=8,
        use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1000,
    )
    trainer = Trainer(model=LlamaForCausalLM(config).to(dtype), args=arguments, train_dataset=texts)
    sys.stdout = sys.stderr  # what Trainer prints
    trainer.train(resume_from_checkpoint=resume)
    sys.stdout = sys.__stdout__
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


print(f"transformers {version('transformers')}, torch {torch.__version__}: 20 steps, and 10 that are resumed for 10")
seen = {}
for optimizer, dtype in (("adafactor", torch.bfloat16), ("adafactor", torch.float32), ("adamw_torch", torch.bfloat16)):
    name = f"run{len(seen)}"
    whole = weights(name, optimizer, dtype)
    resumed = weights(f"{name}again", optimizer, dtype, f"{name}/checkpoint-10")
    seen[optimizer, dtype] = float((whole != resumed).float().mean())
    saved = torch.load(f"{name}/checkpoint-10/optimizer.pt", weights_only=True)["state"].values()
    kinds = {value.dtype for state in saved for part, value in state.items() if "exp_avg" in part}
    print(f"  {optimizer:11} weights {dtype}, averages in the checkpoint {kinds}: "
          f"{100 * seen[optimizer, dtype]:.0f} % of the weights are others")
first, *others = seen.values()
if not first > 0.01 or any(others):
    sys.exit("This has changed.")
PYTHON
