#!/usr/bin/env bash
# mlx-lm 0.32.2, mlx 0.32.4, CPU. Speculative decoding. Expected: a draft changes how soon a token is there, never which; a target
# whose cache cannot be rewound is refused, and a draft's guesses continue the text. Seen: a Mamba-2 as target is refused.
# But caches are looked at before the first token only. One of a sliding window cannot be rewound any more once its window is
# full; from there on what was rejected stays in it, and in the caches of all other layers, too, and the greedy text is another
# one, without a word (mlx-lm pull request 1427). The draft's cache is never looked at: a Mamba-2 goes on from its own
# rejected guesses.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check mlx-lm==0.32.2 mlx==0.32.4 \
  mlx-cpu==0.32.4 transformers==5.23.0 numpy==2.4.6
cd "$here"
HF_HUB_OFFLINE=1 env/bin/python -W ignore - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import llama, mamba2

size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 32, "tie_word_embeddings": True}


def random(model, seed):
    mx.random.seed(seed)
    model.update(tree_map(lambda w: 0.3 * mx.random.normal(w.shape) if w.ndim > 1 else w, model.parameters()))
    return model


def transformer(seed, window=None):
    layers = ["sliding_attention" if window else "full_attention", "full_attention"]
    more = {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "layer_types": layers, "sliding_window": window}
    return random(llama.Model(llama.ModelArgs(model_type="llama", **size, **more)), seed)


def recurrent(seed):
    more = {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1, "conv_kernel": 4, "layer_norm_epsilon": 1e-5}
    more |= {"use_bias": False, "use_conv_bias": True, "time_step_limit": (0.0, 1e9), "time_step_rank": 4}
    return random(mamba2.Model(mamba2.ModelArgs(model_type="mamba2", **size, **more)), seed)


class Watched:
    """A draft that notes its guess after every call."""

    def __init__(self, model):
        self.model, self.layers, self.make_cache, self.guesses = model, model.layers, model.make_cache, []

    def __call__(self, ids, cache):
        logits = self.model(ids, cache=cache)
        self.guesses.append(int(logits[0, -1].argmax()))
        return logits


prompt, length, ahead = [3, 1, 4, 1, 5, 9, 2, 6], 64, 3


def greedy(target, draft=None):
    if draft is None:
        return [int(token) for token, _ in generate_step(mx.array(prompt), target, max_tokens=length)]
    steps = speculative_generate_step(mx.array(prompt), target, draft, max_tokens=length, num_draft_tokens=ahead)
    return [(int(token), guessed) for token, _, guessed in steps]


print(f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}: greedy text of {length} tokens after {len(prompt)}, drafts of {ahead}")
same = {}
for window in (16, 1024):
    found = []
    for seed in range(4):
        target, draft = transformer(seed, window), transformer(seed + 10)
        alone, drafted = greedy(target), [token for token, _ in greedy(target, draft)]
        found.append(next((place for place in range(length) if alone[place] != drafted[place]), None))
    same[window] = found
    print(f"  target with a window of {window:4}: with a draft another token at (4 models) {found}")

try:
    greedy(recurrent(0), transformer(10))
    refused = False
except ValueError as error:
    refused = "trimmable" in str(error)
    print(f"  target Mamba-2: ValueError: {error}")

shares = {}
for name, make in (("Transformer", transformer), ("Mamba-2", recurrent)):
    draft = Watched(make(10))
    text = greedy(transformer(0), draft)
    calls = iter(draft.guesses[1:])  # the first reads the prompt
    done, right, rounds = 0, 0, 0
    while done < length - ahead - 1:  # a round: guesses, then tokens up to the first that was not guessed
        first = next(calls)
        for _ in range(ahead - 1):
            next(calls)
        known = prompt + [token for token, _ in text[:done]]
        right += int(draft.model(mx.array([known]), cache=None)[0, -1].argmax()) == first
        rounds += 1
        while text[done][1]:
            done += 1
        done += 1
    shares[name] = right / rounds
    print(f"  draft {name:11}: {right} of {rounds} first guesses of a round are the draft's own for the text so far")
if not (all(place is not None and place >= 16 - len(prompt) - ahead for place in same[16]) and same[1024] == [None] * 4 and refused):
    sys.exit("This has changed.")
if not shares["Transformer"] == 1 > 0.5 > shares["Mamba-2"]:
    sys.exit("This has changed.")
PYTHON
