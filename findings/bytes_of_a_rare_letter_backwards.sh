#!/usr/bin/env bash
# kitoken 0.11.1, sentencepiece 0.2.3, CPU. Models with byte fallback are trained by SentencePiece and read by Kitoken, which calls
# itself compatible with it. Expected: the same ids, or an error. Seen: in a Unigram model a letter that is no piece comes as its
# UTF-8 bytes in reverse order, so that not even Kitoken's own `decode` gives the text again; a tab stays a tab where the
# normaliser of SentencePiece's default makes a space of it; and with `split_by_whitespace=False` Kitoken makes no piece of more
# than one word, in BPE too. No word is said. Plain words in one line, and bytes in BPE, come out the same.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check kitoken==0.11.1 sentencepiece==0.2.3
cd "$here"
env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import io
import random
import sys
from importlib.metadata import version

import sentencepiece
from kitoken import Kitoken

WORDS = "the river boat lantern harbour walks quickly under stone bridge of night and morning".split()
dice = random.Random(0)
LINES = [" ".join(dice.choices(WORDS, k=12)) for _ in range(500)]
TEXTS = {"plain words": LINES[0], "a rare letter": "the café", "a rare sign": "of €5", "a tab": "the\tboat"}


def both(kind, **choice):
    """SentencePiece's processor of a new model, and Kitoken's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, model_type=kind, vocab_size=400, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, **choice
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), Kitoken.from_sentencepiece(model.getvalue())


print(f"kitoken {version('kitoken')}, sentencepiece {version('sentencepiece')}: are the ids the same?")
seen = {}
for name, kind, choice in (
    ("bpe", "bpe", {}),
    ("unigram", "unigram", {}),
    ("bpe over spaces", "bpe", {"split_by_whitespace": False}),
    ("unigram over spaces", "unigram", {"split_by_whitespace": False}),
):
    right, fast = both(kind, **choice)
    for what, text in TEXTS.items():
        ids, others = right.encode(text), fast.encode(text, False)
        seen[name, what] = "same" if ids == others else "another order" if sorted(ids) == sorted(others) else "others"
        ends = [" ".join(right.id_to_piece(end[-4:])) for end in (ids, others)]
        told = "" if ids == others else f": {ends[0]}, Kitoken {ends[1]}, read back {fast.decode(others).decode(errors='replace')[-9:]!r}"
        print(f"  {name:20} {what:14} {seen[name, what]}{told}")
expected = dict.fromkeys(seen, "same") | {(name, "a tab"): "others" for name, _ in seen}
expected |= {(name, what): "another order" for name in ("unigram", "unigram over spaces") for what in ("a rare letter", "a rare sign")}
expected |= {(name, "plain words"): "others" for name in ("bpe over spaces", "unigram over spaces")}
if seen != expected:
    sys.exit("This has changed.")
PYTHON
