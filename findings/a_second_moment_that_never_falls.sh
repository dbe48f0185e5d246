#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0, CPU. Weights get gradients of deviation 1 for 100 steps, and of 0.01 for 6,000. torch's AdamW, fused
# or not, and a Trainer's default optimizer keep their moments in the type of the weights.
# Expected: the mean of squares forgets, as in float32, so that steps are soon as long as the learning rate again; in bfloat16 somewhat
# roughly. Seen: with bfloat16 weights and beta2 0.999, the default, it never falls at all: a step takes a thousandth away, and bfloat16
# rounds that off. Its root stays at 0.31, its highest; in float32 it is 0.018 at the end, so that steps are 17 times as long there.
# With beta2 0.95 it falls in bfloat16, too. A weight decay of 0.1 at a rate of 0.001 is rounded off as well: weights stay as they are.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
  transformers==5.23.0 accelerate==1.15.0
cd "$here"
env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version

import torch
from transformers import Trainer, TrainingArguments

torch.set_num_threads(1)


def default(weight, betas):
    """The optimizer of a Trainer, as its arguments have it."""
    model = torch.nn.Module()
    model.weight = weight
    arguments = TrainingArguments("out", learning_rate=0.001, adam_beta2=betas[1], use_cpu=True, report_to="none")
    return Trainer(model, arguments, train_dataset=[0]).create_optimizer()


def torchs(**options):
    return lambda weight, betas: torch.optim.AdamW([weight], lr=0.001, betas=betas, weight_decay=0, **options)


KINDS = {
    "AdamW": torchs(),
    "AdamW, fused": torchs(fused=True),
    "a Trainer's": default,
}
print(f"torch {torch.__version__}, transformers {version('transformers')}: root of mean square kept, after steps 100, 1,000, 3,000, 6,100")
seen = {}
for name, make in KINDS.items():
    for beta in (0.999, 0.95):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            weight = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
            optimizer, roots = make(weight, (0.9, beta)), []
            for step in range(1, 6101):
                weight.grad = (torch.randn(1000) * (1 if step <= 100 else 0.01)).to(dtype)
                optimizer.step()
                if step in (100, 1000, 3000, 6100):
                    roots.append(float(optimizer.state[weight]["exp_avg_sq"].float().sqrt().mean()))
            seen[name, beta, dtype] = roots
            told = ", ".join(f"{root:.4f}" for root in roots)
            print(f"  {name:15} beta2 {beta}, {str(dtype)[6:]:8}: {told}")
weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
optimizer = torch.optim.AdamW([weight], lr=0.001, weight_decay=0.1)
for _ in range(6100):
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
print(f"  weights of 1 after 6,100 steps of decay 0.0001: {float(weight.detach().float().mean()):.3f} in bfloat16, {0.9999**6100:.3f} by arithmetic")
stuck = all(roots[0] == roots[-1] > 0.2 for (_, beta, dtype), roots in seen.items() if beta == 0.999 and dtype is torch.bfloat16)
falls = all(roots[-1] < 0.03 for (_, beta, dtype), roots in seen.items() if beta == 0.95 or dtype is torch.float32)
if not stuck or not falls or float(weight.detach().float().mean()) != 1:
    sys.exit("This has changed.")
PYTHON
