#!/usr/bin/env bash
# peft 0.21.2, trl 1.16.0, transformers 5.23.0, torch 2.13.0, CPU. A small Llama gets LoRA adapters of each kind of start, and is trained
# with DPO, whose reference model is the one with its adapters disabled.
# Expected: `disable_adapter`, "to run inference on the base model", gives the base model's logits, and DPO begins with the loss
# log 2 and rewards of 0. Seen with `init_lora_weights` "pissa", "pissa_niter_4" and "olora": logits of another model, for what the
# adapter begins with was taken out of the weights, and disabling does not put it back; the reference has lost the largest part of
# its matrices, and rewards are not 0. `unload` gives that model, too. An adapter that began with "pissa_niter_4" is another model when
# it is loaded again, for what is taken out is drawn anew. No warning. True, "gaussian" and "orthogonal" do as expected.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
  transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 peft==0.21.2 trl==1.16.0
cd "$here"
HF_HUB_OFFLINE=1 env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import copy
import math
import sys
from importlib.metadata import version

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

torch.set_num_threads(1)
torch.manual_seed(0)
WORDS = ["<unk>", "<pad>", "<end>", *"abcdefgh"]
backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<end>")
config = LlamaConfig(
    vocab_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    initializer_range=0.1, pad_token_id=1, eos_token_id=2,
)  # fmt: skip
base, ids = LlamaForCausalLM(config).eval(), torch.randint(3, 11, (2, 16))
PAIRS = [{"prompt": "a b", "chosen": " c d e", "rejected": " f g h"}, {"prompt": "b b a", "chosen": " c c", "rejected": " h g f"}]


def far(model, wanted):
    """How far the logits are off, in parts of themselves."""
    with torch.no_grad():
        logits = model(ids).logits
    return float((logits - wanted).norm() / wanted.norm())


def adapter(start):
    return LoraConfig(r=16, lora_alpha=16, init_lora_weights=start, target_modules="all-linear", task_type="CAUSAL_LM")


print(", ".join(f"{name} {version(name)}" for name in ("peft", "trl", "transformers", "torch")) + ": parts by which logits are off")
with torch.no_grad():
    wanted = base(ids).logits
seen = {}
for start in (True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"):
    model = get_peft_model(copy.deepcopy(base), adapter(start)).eval()
    begun = far(model, wanted)
    with model.disable_adapter():
        disabled = far(model, wanted)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn_like(weight) * 0.05)  # as if trained
        trained = model(ids).logits
    model.save_pretrained("adapter")
    again = far(PeftModel.from_pretrained(copy.deepcopy(base), "adapter").eval(), trained)
    unloaded = far(model.unload(), wanted)
    arguments = DPOConfig(
        output_dir="dpo", per_device_train_batch_size=2, max_steps=1, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=copy.deepcopy(base), args=arguments, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer,
        peft_config=adapter(start),
    )  # fmt: skip
    stdout, sys.stdout = sys.stdout, sys.stderr
    trainer.train()
    sys.stdout = stdout
    first = trainer.state.log_history[0]
    seen[start] = (begun, disabled, again, unloaded, abs(first["loss"] - math.log(2)), abs(first["rewards/chosen"]))
    told = f"as it begins {begun:.3f}, disabled {disabled:.3f}, unloaded {unloaded:.3f}, loaded again {again:.3f}"
    print(f"  {start!s:13} {told}; DPO begins with loss {first['loss']:.3f}, reward {first['rewards/chosen']:.3f}")
whole = all(max(values) < 1e-4 for start, values in seen.items() if start in (True, "gaussian", "orthogonal"))
taken = all(seen[start][0] < 1e-4 and min(seen[start][1], seen[start][3]) > 0.3 for start in ("pissa", "pissa_niter_4", "olora"))
taken = taken and all(min(seen[start][4:]) > 0.005 for start in ("pissa", "olora"))
if not whole or not taken or seen["pissa"][2] > 1e-4 or seen["olora"][2] > 1e-4 or seen["pissa_niter_4"][2] < 0.1:
    sys.exit("This has changed.")
PYTHON
