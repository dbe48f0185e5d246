#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU. A model class of one's own whose forward takes `past_key_values` and
# `**kwargs` generates with `generate`. Expected: what it generates without a cache, or an error. Seen: `generate` now
# hands on what came before as `cache`, which ends up in `**kwargs`; every new token is chosen from the last one alone,
# and nothing is said but that the old name of an output is deprecated. 5.23.0 is right.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$here/model.py" <<'PYTHON'
import sys

import torch
import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class Config(PretrainedConfig):
    model_type = "sum-of-the-past"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = 17, 8, 1
        self.num_attention_heads = self.num_key_value_heads = 1


class Model(PreTrainedModel, GenerationMixin):
    """The next token is the sum of all tokens so far, modulo 17; the cache holds the tokens as its keys."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.unused = nn.Linear(1, 1)
        self.post_init()

    def forward(self, input_ids, past_key_values=None, use_cache=None, attention_mask=None, **kwargs):
        own = input_ids[:, None, :, None].float()
        past_key_values = DynamicCache() if past_key_values is None else past_key_values
        keys, _ = past_key_values.update(own, own, 0)
        best = (keys.sum((1, 2, 3)) % 17).long()
        logits = nn.functional.one_hot(best, 17).float()[:, None].expand(-1, input_ids.shape[1], -1)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values if use_cache else None)


model = Model(Config()).eval()
prompt = torch.tensor([[3, 5]])
options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
with_cache = model.generate(prompt, **options)[0].tolist()
without = model.generate(prompt, use_cache=False, **options)[0].tolist()
print(f"transformers {transformers.__version__}: {with_cache} with a cache, {without} without")
sys.exit((with_cache == without) != (sys.argv[1] == "right") or without != [3, 5, 8, 16, 15, 13])
PYTHON
for release in "5.23.0 right" "5.24.0 wrong"; do
    read -r version expected <<< "$release"
    "$here/env/bin/python" -m pip install --quiet --disable-pip-version-check \
        "transformers==$version" huggingface_hub==2.4.0
    "$here/env/bin/python" "$here/model.py" "$expected" 2> "$here/said" || { cat "$here/said"; echo "this has changed"; exit 1; }
    grep -i cache "$here/said" || true
done
