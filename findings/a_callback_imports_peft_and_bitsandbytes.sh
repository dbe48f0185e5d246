#!/usr/bin/env bash
# transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2, torch 2.13.0. A package subclasses TrainerCallback, a class of
# empty methods. Expected: the import costs what a small module costs, since importing a model class touches neither
# peft nor bitsandbytes. Seen: `from transformers import TrainerCallback` imports both wherever they are installed
# (its module asks `trainer_utils` for two enumerations, which imports PeftModel for one isinstance), and both at once
# take about as long as PyTorch.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    transformers==5.23.0 huggingface_hub==2.4.0 peft==0.21.2 bitsandbytes==0.50.2
"$here/env/bin/python" - <<'PYTHON' 2>/dev/null
import sys
import time

import transformers
from transformers import PreTrainedModel

assert PreTrainedModel
seen = {"after a model class": {"peft", "bitsandbytes"} & {*sys.modules}}
start = time.perf_counter()
from transformers import TrainerCallback  # noqa: E402

seconds = time.perf_counter() - start
seen["after a callback"] = {"peft", "bitsandbytes"} & {*sys.modules}
print(f"transformers {transformers.__version__}; methods of a callback that do anything:", end=" ")
print(sum(bool(getattr(TrainerCallback, name).__code__.co_names) for name in dir(TrainerCallback) if name[:3] == "on_"))
for when, names in seen.items():
    print(f"  {when}: {', '.join(sorted(names)) or 'neither'}")
print(f"  {seconds:.1f} s for the callback")
if list(seen.values()) != [set(), {"peft", "bitsandbytes"}]:
    raise SystemExit("changed: expected neither, then both")
PYTHON
