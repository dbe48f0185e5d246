#!/usr/bin/env bash
# transformers 5.23.0. A package adds a class of its own to the module `transformers`, under the name that config.json
# gives in `architectures`: `transformers serve` looks it up there. Expected: whoever imported `transformers` sees it.
# Seen: importing transformers.processing_utils runs the package's __init__ a second time and puts another module into
# sys.modules. Who imported `transformers` before keeps the first and does not see what is added to the second; who
# imports it later does. Classes are in both, and equal.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    transformers==5.23.0 tokenizers==0.23.3 huggingface_hub==2.4.0
"$here/env/bin/python" - <<'PYTHON' 2>/dev/null
import transformers as before
import transformers.processing_utils
import transformers as after

after.MyModelForCausalLM = object
print(f"transformers {before.__version__}")
seen = {
    "one module": before is after,
    "one class": before.PreTrainedConfig is after.PreTrainedConfig,
    "an early importer sees what was added": hasattr(before, "MyModelForCausalLM"),
    "a late one does": hasattr(after, "MyModelForCausalLM"),
}
for name, answer in seen.items():
    print(f"  {name}: {answer}")
if list(seen.values()) != [False, True, False, True]:
    raise SystemExit("changed: expected no, yes, no, yes")
PYTHON
