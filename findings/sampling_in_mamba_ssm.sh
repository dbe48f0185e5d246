#!/usr/bin/env bash
# mamba-ssm 2.3.2.post1, torch 2.13.0, CPU (its file of plain PyTorch that generates text). `generate(top_k=0, min_p=…)`, as its
# README does. Expected: min-p keeps tokens whose probability is at least min_p times that of the likeliest (Nguyen et al.
# 2024). Seen: it keeps tokens whose logit is at least min_p times the logit of token 0. Which those are depends on a constant
# that is added to all logits and changes no probability; often nothing is left out (its pull request 1010). And a batch ends
# when all its rows say the end token in the same step: a row that said it goes on, and two rows that say it one after the
# other go on to the length that was asked for.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
  einops==0.8.2 numpy==2.4.6 setuptools==84.2.1 wheel==0.48.0 packaging==26.3
cd "$here"
MAMBA_SKIP_CUDA_BUILD=TRUE env/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --no-binary mamba-ssm mamba-ssm==2.3.2.post1
tar xzf mamba_ssm-*.tar.gz --strip-components=3 --wildcards '*/mamba_ssm/utils/generation.py'
env/bin/python -W ignore - <<'PYTHON'
import sys
from types import SimpleNamespace

import torch
from generation import decode, sample

print(f"mamba-ssm 2.3.2.post1, torch {torch.__version__}: two tokens have 30 and 60 %, each of 98 others 0.1 %; min_p is 0.05")
probabilities = torch.full((1, 100), 0.1 / 98)
probabilities[0, [0, 7]] = torch.tensor([0.3, 0.6])
torch.manual_seed(0)
seen = {}
for shift in (0.0, 5.0, 20.0):
    logits = probabilities.log() + shift
    assert torch.allclose(logits.softmax(-1), probabilities)
    draws = [int(sample(logits.clone(), top_k=0, min_p=0.05)) for _ in range(4000)]
    seen[shift] = sum(draw not in (0, 7) for draw in draws) / len(draws)
    print(f"  logits shifted by {shift:5}: {100 * seen[shift]:.1f} % of the draws are of the 98, which min-p leaves out")

END = 9
texts = torch.tensor([[1, 2, END, 3, 4, 5, 6, 1], [1, 2, 3, END, 4, 5, 6, 2]])


class Model:
    """Says one line of `texts` in each row."""

    def __call__(self, input_ids, position_ids, inference_params, num_last_tokens):
        place = inference_params.seqlen_offset + input_ids.shape[1]
        logits = torch.nn.functional.one_hot(texts[:, place], 10).float()
        return SimpleNamespace(logits=logits[:, None])


torch.cuda.Event = lambda **_: None  # of its timing, which is off
written = decode(texts[:, :1], Model(), max_length=8, eos_token_id=END).sequences.tolist()
for row in written:
    print(f"  a row of a batch with end token {END}: {row}")
if not (seen[0.0] > 0.05 and seen[5.0] == 0 and seen[20.0] > 0.05) or written != texts.tolist():
    sys.exit("This has changed.")
PYTHON
