#!/usr/bin/env bash
# tokenizers 0.23.3. A tokenizer is trained twice on the same texts, in the same order, with the same settings; no trainer
# has a seed. Expected: the same tokenizer. Seen: byte-pair encoding and word levels come out the same every time;
# WordPiece finds the same pieces and gives some of them other numbers every time. So ids that were prepared with the
# one are another text to a model that was trained with the other.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3
"$here/env/bin/python" - <<'PYTHON'
import random
import sys

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

draw = random.Random(0)
words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 6))) for _ in range(3000)]
texts = [" ".join(draw.choice(words) for _ in range(200)) for _ in range(100)]
kinds = {
    "byte-pair encoding": (models.BPE, trainers.BpeTrainer),
    "word levels": (models.WordLevel, trainers.WordLevelTrainer),
    "WordPiece": (models.WordPiece, trainers.WordPieceTrainer),
}


def train(model, trainer):
    own = Tokenizer(model(unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.train_from_iterator(texts, trainer(vocab_size=1000, show_progress=False, special_tokens=["[UNK]"]))
    return own


print(f"tokenizers {tokenizers.__version__}, five trainings each on {len(texts)} texts:")
seen = {}
for name, (model, trainer) in kinds.items():
    trained = [train(model, trainer) for _ in range(5)]
    pieces = {frozenset(own.get_vocab()) for own in trained}
    numbers = {tuple(sorted(own.get_vocab().items())) for own in trained}
    ids = {tuple(own.encode(texts[0]).ids) for own in trained}
    first, second = trained[0].get_vocab(), trained[1].get_vocab()
    moved = sum(second.get(piece) != number for piece, number in first.items())
    seen[name] = (len(pieces), len(numbers), len(ids))
    print(f"  {name:18} sets of pieces: {len(pieces)}, numberings: {len(numbers)}, encodings of a text: {len(ids)}; ", end="")
    print(f"pieces with another number the second time: {moved} of {len(first)}")
if not (
    seen["byte-pair encoding"] == seen["word levels"] == (1, 1, 1) and seen["WordPiece"][0] == 1 and seen["WordPiece"][1] > 1
):
    sys.exit("That is no longer so.")
PYTHON
