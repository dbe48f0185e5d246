#!/usr/bin/env bash
# tokenizers 0.23.3. Expected: the pieces of a DecodeStream, joined, are decode() of all ids, or the stream has a way
# to ask for the rest at the end. Seen: bytes that do not complete a character are held back until a later token ends
# in a whole character; a text that ends on such bytes (a generation cut off by its length) loses them. There is no
# method to ask for them.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3
"$here/env/bin/python" - <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁a": 257, "▁b": 258}
tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def streamed(ids):
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, token) for token in ids]


cut, whole = [257, 0xE2 + 1, 0x82 + 1], [257, 0xE2 + 1, 0x82 + 1, 258]
print(f"tokenizers {tokenizers.__version__}")
for ids in (cut, whole):
    print(f"  decode {tokenizer.decode(ids)!r}, streamed {streamed(ids)}")
methods = [name for name in dir(DecodeStream) if not name.startswith("_")]
print(f"  methods of a stream: {methods}")
if tokenizer.decode(cut) != "a\ufffd\ufffd" or streamed(cut) != ["a", None, None]:
    raise SystemExit("changed: the end of the text is no longer held back")
if streamed(whole) != ["a", None, None, "\ufffd\ufffd b"] or methods != ["step"]:
    raise SystemExit("changed")
PYTHON
