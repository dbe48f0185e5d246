#!/usr/bin/env bash
# transformers 5.23.0, sentencepiece 0.2.3. A directory with a SentencePiece model of one's own (`tokenizer.model`, byte pairs) is
# given to `AutoTokenizer`. Expected: it splits a text as SentencePiece does, since the file holds how: what characters are
# made alike, whether spaces that are too many go, whether a space is put before the text. Seen: `LlamaTokenizer` reads
# none of that and has Llama's ways; `PreTrainedTokenizerFast` puts no space before the text, whatever the file says, and keeps
# all spaces. Of a model trained with SentencePiece's defaults, the one makes other tokens of a line break or two spaces, the other
# of every text. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 sentencepiece==0.2.3 \
  tokenizers==0.23.3 protobuf==7.36.2 numpy==2.4.6
cd "$here"
HF_HUB_OFFLINE=1 env/bin/python -W ignore - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import json
import random
import sys
from importlib.metadata import version
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer

random.seed(0)
WORDS = "the cat sat on a mat and a dog with it saw that this was as it is in there of what".split()
lines = [" ".join(random.choices(WORDS, k=random.randint(3, 12))) for _ in range(3000)]
TEXTS = ("the cat sat on the mat", "the  dog   saw that", "the cat\nsat on it")
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
TRAINED = {"Llama's settings": LLAMA, "no space before": {**LLAMA, "add_dummy_prefix": False}, "the defaults": {}}

print(f"transformers {version('transformers')}, sentencepiece {version('sentencepiece')}: texts that are split as by SentencePiece")
seen = {}
for name, choice in TRAINED.items():
    for given in ("LlamaTokenizer", "PreTrainedTokenizerFast"):
        directory = Path(f"{len(seen)}")
        directory.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(directory / "tokenizer"), vocab_size=320, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **choice,
        )
        (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": given}))
        own = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        tokenizer = AutoTokenizer.from_pretrained(directory)
        found = seen[name, given] = [
            own.encode(text) == tokenizer.encode(text, add_special_tokens=False) for text in TEXTS
        ]
        print(f"  trained with {name:17} {given:23} {found}")
        if not all(found):
            text = TEXTS[found.index(False)]
            print(f"    {text!r}: {own.encode(text, out_type=str)}, here {tokenizer.tokenize(text)}")
llama, plain = ([seen[name, given] for name in TRAINED] for given in ("LlamaTokenizer", "PreTrainedTokenizerFast"))
if llama != [[True] * 3, [False] * 3, [True, False, False]] or plain != [[False] * 3, [True] * 3, [False] * 3]:
    sys.exit("This has changed.")
PYTHON
