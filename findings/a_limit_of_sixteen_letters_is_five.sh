#!/usr/bin/env bash
# tokenizers 0.23.3, CPU. A byte-pair encoding is trained with `max_token_length` on the beginnings of an alphabet, 1 letter, 2
# letters and so on, so that there is a token of every length that may be. Expected: with a limit of n the longest has n letters,
# or n bytes with the byte-level pre-tokenizer. Seen: it has n - 1 letters, and never fewer than two symbols, be the limit 1, 2 or
# 3. With byte-level symbols their own bytes are counted, two for most that are not ASCII, the space before a word among
# them: a limit of 16 leaves 7 Greek letters or 5 Kana, and one of 4 only one. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check tokenizers==0.23.3
HF_HUB_OFFLINE=1 "$here/env/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ALPHABETS = {
    "Latin": "abcdefghijklmnopqrstuvwxyz",
    "Greek": "αβγδεζηθικλμνξοπρστυφχψω",
    "Kana": "あいうえおかきくけこさしすせそたちつてとなにぬね",
}
LIMITS = (1, 2, 3, 4, 8, 16, None)


def longest(alphabet, limit, byte_level):
    """The letters of the longest token that has no broken letter in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=2000, max_token_length=limit, show_progress=False)
    tokenizer.train_from_iterator([" ".join(alphabet[:count] for count in range(1, len(alphabet) + 1))] * 20, trainer)
    texts = (tokenizer.decode([index]).strip() for index in tokenizer.get_vocab().values())
    return max(len(text) for text in texts if "\ufffd" not in text)


print(f"tokenizers {version('tokenizers')}: letters of the longest token, by max_token_length")
print(f"  {'':17}", "".join(f"{limit!s:>6}" for limit in LIMITS))
seen = {}
for name, alphabet in ALPHABETS.items():
    for byte_level in (False, True):
        seen[name, byte_level] = [longest(alphabet, limit, byte_level) for limit in LIMITS]
        print(f"  {name:6}{'bytes' if byte_level else 'letters':11}", "".join(f"{count:6}" for count in seen[name, byte_level]))
plain = [[*found[:-1]] for (_, byte_level), found in seen.items() if not byte_level]
greek, kana = seen["Greek", True], seen["Kana", True]
if plain != [[2, 2, 2, 3, 7, 15]] * 3 or (greek[3], greek[5], kana[3], kana[5]) != (1, 7, 1, 5):
    sys.exit("This has changed.")
if any(found[-1] != len(ALPHABETS[name]) for (name, _), found in seen.items()):
    sys.exit("This has changed.")
PYTHON
