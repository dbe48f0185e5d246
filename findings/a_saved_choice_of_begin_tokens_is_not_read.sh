#!/usr/bin/env bash
# transformers 5.23.0. Expected: `add_bos_token` and `add_eos_token` in a tokenizer_config.json decide what is put
# around a text, as they do where they are passed to from_pretrained. Seen: beside a tokenizer.json both are dropped
# without a word; its post-processor decides. The two ways to say the same thing give two encodings of one text.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
"$here/env/bin/python" - "$here" <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

directory = Path(sys.argv[1]) / "tokenizer"
directory.mkdir()
backend = Tokenizer(models.WordLevel({"<s>": 0, "hi": 1}, unk_token="hi"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
backend.add_special_tokens(["<s>"])
backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
backend.save(str(directory / "tokenizer.json"))
config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "add_bos_token": False}
(directory / "tokenizer_config.json").write_text(json.dumps(config))
seen = {
    "add_bos_token: false in tokenizer_config.json": PreTrainedTokenizerFast.from_pretrained(directory)("hi").input_ids,
    "add_bos_token=False passed": PreTrainedTokenizerFast.from_pretrained(directory, add_bos_token=False)("hi").input_ids,
}
print(f"transformers {transformers.__version__}")
for name, ids in seen.items():
    print(f"  {name}: {ids}")
if list(seen.values()) != [[0, 1], [1]]:
    raise SystemExit("changed: expected [0, 1] and [1]")
PYTHON
