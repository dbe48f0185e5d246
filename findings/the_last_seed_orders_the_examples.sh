#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, CPU. A run of Trainer with `seed=3` is interrupted in mid-epoch and resumed
# from its checkpoint by a program that is the same but for `torch.manual_seed(9)` between making the Trainer and `train`, as
# where a text is sampled first to see what the model says. Expected: `seed` orders the examples, whose rest is read after the
# resume: each of the epoch once. Seen: the order is that of the seed that was set last, by whoever it was (accelerate takes
# `torch.random.initial_seed()`). Examples of that epoch are read twice, as many are never read, the weights are others, and no
# word is said. Random numbers that are only drawn change nothing, nor does a seed where `data_seed` is given. A new run has the
# examples in another order too.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$here"
cat > orders.py <<'PYTHON'
from importlib.metadata import version

import torch
import transformers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
EXAMPLES, BATCH, STEPS, KEPT, STOPPED = 40, 4, 10, 6, 7  # an epoch; its checkpoint; where the first part ends


class Seen(Dataset):
    def __init__(self):
        self.numbers = []

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, number):
        self.numbers.append(number)
        return {"input_ids": torch.full((8,), number), "labels": torch.full((8,), number)}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **rest):
        control.should_training_stop |= state.global_step == STOPPED


def train(name, *, stop=False, resume=False, between=lambda: None, **given):
    """The numbers of the examples of each step that is taken, and the weights after the last one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=EXAMPLES, bos_token_id=0, eos_token_id=1, **sizes))
    arguments = TrainingArguments(
        name, per_device_train_batch_size=BATCH, max_steps=STEPS, save_steps=KEPT, seed=3, report_to=[], use_cpu=True,
        logging_strategy="no", disable_tqdm=True, **given,
    )  # fmt: skip
    data = Seen()
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Stop()] if stop else [])
    trainer.remove_callback(PrinterCallback)
    between()
    trainer.train(resume_from_checkpoint=f"{name}/checkpoint-{KEPT}" if resume else None)
    return data.numbers, torch.cat([weight.detach().flatten() for weight in model.parameters()])


def resumed(name, between, **given):
    """Of a resumed epoch: how many examples come twice, how many never, and whether the weights are those of the whole run."""
    whole, weights = train(f"{name}-whole", **given)
    first, _ = train(f"{name}-cut", stop=True, **given)
    rest, own = train(f"{name}-cut", resume=True, between=between, **given)
    read = first[: KEPT * BATCH] + rest[-(STEPS - KEPT) * BATCH :]
    assert sorted(whole) == list(range(EXAMPLES)) and first[: KEPT * BATCH] == whole[: KEPT * BATCH]
    return EXAMPLES - len(set(read)), bool(torch.equal(own, weights))


if __name__ == "__main__":
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "accelerate", "torch"))
    print(f"{versions}: an epoch of {EXAMPLES} examples, resumed after {KEPT * BATCH}")
    cases = {
        "nothing between": (lambda: None, {}),
        "numbers are drawn between": (lambda: torch.rand(1000), {}),
        "a seed is set between": (lambda: torch.manual_seed(9), {}),
        "a seed is set between, data_seed=5": (lambda: torch.manual_seed(9), {"data_seed": 5}),
    }
    seen = {}
    for number, (name, (between, given)) in enumerate(cases.items()):
        never, same = seen[name] = resumed(str(number), between, **given)
        print(f"  {name:34}: {never} examples never read, as many twice; weights {'the same' if same else 'others'}")
    fresh = [train(f"fresh-{number}", between=between)[0] for number, (between, _) in enumerate(cases.values())][:3]
    print(f"  a new run: order the same if numbers are drawn {fresh[1] == fresh[0]}, if a seed is set {fresh[2] == fresh[0]}")
    assert all(seen[name] == (0, True) for name in cases if name != "a seed is set between"), seen
    never, same = seen["a seed is set between"]
    assert never >= 4 and not same, seen
    assert fresh[1] == fresh[0] != fresh[2]
    print("as described")
PYTHON
"$here/env/bin/python" orders.py
