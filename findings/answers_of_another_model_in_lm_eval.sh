#!/usr/bin/env bash
# lm-eval 0.4.13, torch 2.13.0, transformers 5.23.0, CPU. Two models are asked the same questions with `use_cache` (`--use_cache`
# of its command), which keeps answers in a file so that what was asked is not asked again. Expected: an answer is that of
# the model that is asked. Seen: an answer is found by the text of the question alone: the second model gets the scores of the
# first and computes nothing, and so does a model after its further training in the same directory. No warning is given.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check lm-eval==0.4.13 datasets==5.2.0 \
  numpy==2.4.6 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 tokenizers==0.23.3
cd "$here"
HF_HUB_OFFLINE=1 HF_HOME="$here/home" env/bin/python -W ignore - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import json
import sys
from importlib.metadata import version

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

with open("text.jsonl", "w") as file:
    file.writelines(json.dumps({"text": f"{number} and {number + 1} are two numbers"}) + "\n" for number in range(10))
with open("task.yaml", "w") as file:
    file.write(
        "task: numbers\ndataset_path: json\ndataset_kwargs:\n  data_files: text.jsonl\ntest_split: train\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n  - metric: bits_per_byte\n"
    )
letters = pre_tokenizers.ByteLevel.alphabet()
tokenizer = Tokenizer(models.BPE(vocab={"<end>": 0, **{letter: 1 + place for place, letter in enumerate(sorted(letters))}}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
config = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     max_position_embeddings=128, bos_token_id=0, eos_token_id=0)
for seed, name in enumerate(("first", "second")):
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(name)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>").save_pretrained(name)


def bits(name, **choice):
    given = {"pretrained": name, "device": "cpu", "dtype": "float32"}
    sys.stdout = sys.stderr  # what the harness prints
    found = simple_evaluate(model="hf", model_args=given, tasks=["numbers"], bootstrap_iters=0,
                            task_manager=TaskManager(include_path="."), **choice)
    sys.stdout = sys.__stdout__
    return found["results"]["numbers"]["bits_per_byte,none"]


print(f"lm-eval {version('lm-eval')}: bits per byte of ten lines, by two models")
seen = {}
for kind, choice in (("asked alone", {}), ("with use_cache, one after the other", {"use_cache": "answers"})):
    seen[kind] = [bits(name, **choice) for name in ("first", "second")]
    print(f"  {kind:36} first {seen[kind][0]:.6f}, second {seen[kind][1]:.6f}")
alone, cached = seen.values()
if not (alone[0] != alone[1] and cached[0] == cached[1] == alone[0]):
    sys.exit("This has changed.")
PYTHON
