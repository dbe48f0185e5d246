#!/usr/bin/env bash
# sentencepiece 0.2.3, tokenizers 0.23.3, CPU. Unigram vocabularies are trained on lines in which every second word is "capybara".
# Expected: pieces are what is frequent, so that it is one. Seen: SentencePiece breaks it into six pieces or more while it never
# ends a line, and has it whole when it ends one of 3,001; `UnigramTrainer` of tokenizers breaks it unless a longer word
# begins with it, once. Only strings that different characters follow become candidates, and what always stands before a space
# (or, in tokenizers, at the end of a word) is none. Of the 200 commonest words of Python 3.11's help texts 26 and 25 are
# broken at 4,000 pieces ("should", "must", "have", "but"). BPE of either breaks none. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check sentencepiece==0.2.3 tokenizers==0.23.3
cd "$here"
HF_HUB_OFFLINE=1 env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import collections
import io
import random
import re
import sys
from importlib.metadata import version
from pydoc_data.topics import topics

import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

WORD, LINES, SIZES = "capybara", 3000, (100, 200, 300)
draw = random.Random(0)
OTHERS = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(300)]
TEXT = [" ".join(word for _ in range(4) for word in (WORD, draw.choice(OTHERS))) for _ in range(LINES)]
TEXTS = {
    "never at the end of a line": TEXT,
    "once at the end of a line": [*TEXT, f"{OTHERS[0]} {WORD}"],
    "its plural once": [*TEXT, f"{WORD}s {OTHERS[0]}"],
}
HELP = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n") if part.strip()]
COMMON = [word for word, _ in collections.Counter(re.findall(r"(?<= )[a-z]+(?= )", " ".join(HELP))).most_common(200)]


def by_sentencepiece(lines, kind, size):
    written = io.BytesIO()
    given = {"vocab_size": size, "model_type": kind, "hard_vocab_limit": False, "max_sentence_length": 100_000}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=written, minloglevel=2, **given)
    processor = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return lambda word: processor.encode(word, out_type=str)


def by_tokenizers(lines, kind, size):
    given = {"vocab_size": size, "show_progress": False, "special_tokens": ["<unk>"]}
    tokenizer = tokenizers.Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(unk_token="<unk>", **given) if kind == "unigram" else trainers.BpeTrainer(**given)
    tokenizer.train_from_iterator(lines, trainer)
    return lambda word: tokenizer.encode(word).tokens


print(f"sentencepiece {version('sentencepiece')}, tokenizers {version('tokenizers')}: a word that is half of a text")
seen, broken = {}, {}
for train in (by_sentencepiece, by_tokenizers):
    for kind in ("unigram", "bpe"):
        for name, lines in TEXTS.items():
            pieces = [train(lines, kind, size)(WORD) for size in SIZES]
            seen[train, kind, name] = {len(found) == 1 for found in pieces}
            print(f"  {train.__name__:16} {kind:7} {name:26}: {'; '.join(' '.join(found) for found in pieces)}")
        split = train(HELP, kind, 4000)
        broken[train, kind] = [" ".join(split(word)) for word in COMMON if len(split(word)) > 1]
        print(f"  {train.__name__:16} {kind:7} of the 200 commonest words of Python's help texts {len(broken[train, kind])} are broken: "
              f"{', '.join(broken[train, kind][:6])}")
never, ends, plural = TEXTS
for (train, kind, name), whole in seen.items():
    helps = {by_sentencepiece: ends, by_tokenizers: plural}[train]
    if whole != {kind == "bpe" or name == helps}:
        sys.exit("This has changed.")
if any((len(words) < 10) != (kind == "bpe") for (_, kind), words in broken.items()):
    sys.exit("This has changed.")
PYTHON
