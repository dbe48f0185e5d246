#!/usr/bin/env bash
# xgrammar 0.2.8, llguidance 1.9.1, CPU. A grammar is made of a JSON schema for a string, without and with `minLength` or
# `maxLength`. Expected: a bound counts characters, and else the string is as it is without one: line breaks and quotes are
# escaped, and what a model is let write can be read as JSON. Seen: with a bound xgrammar refuses every escape, so that no
# quote, line break or backslash can be written, and takes tabs and other control characters as they are, which JSON does not
# allow: such a text satisfies the grammar, and `json.loads` refuses it. No word is said. llguidance does as expected.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 xgrammar==0.2.8 \
  llguidance==1.9.1 transformers==5.23.0 numpy==2.4.6
cd "$here"
HF_HUB_OFFLINE=1 env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import json
import sys
from importlib.metadata import version

import llguidance
import xgrammar

LETTERS = ["<end>", *map(chr, range(1, 128))]
compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(LETTERS, stop_token_ids=[0]))


class Letters:
    """The same tokens, as llguidance asks for them."""

    eos_token_id, bos_token_id, special_token_ids = 0, None, [0]
    tokens = [letter.encode() for letter in LETTERS]

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


letters = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Letters()))


def by_xgrammar(schema, text):
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    return all(matcher.accept_token(LETTERS.index(letter)) for letter in text) and matcher.accept_token(0)


def by_llguidance(schema, text):
    matcher = llguidance.LLMatcher(letters, llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    return matcher.consume_tokens([LETTERS.index(letter) for letter in text]) and matcher.is_accepting()


def is_json(text):
    try:
        return isinstance(json.loads(text), str)
    except ValueError:
        return False


def verdict(is_so):
    return "yes" if is_so else "no"


TEXTS = {
    "letters": '"said"', "quotes": r'"\"yes\""', "line break": r'"a\nb"', "backslash": r'"a\\b"',
    "a raw tab": '"a\tb"', "a raw control character": '"a\x01b"', "a raw line break": '"a\nb"',
}  # fmt: skip
print(f"xgrammar {version('xgrammar')}, llguidance {version('llguidance')}: may a model write this, and end?")
seen = {}
for bound in ({}, {"minLength": 1}, {"maxLength": 20}):
    schema = {"type": "string", **bound}
    for name, text in TEXTS.items():
        found = seen[tuple(bound), name] = by_xgrammar(schema, text), by_llguidance(schema, text), is_json(text)
        told = [verdict(each) for each in found]
        print(f"  {json.dumps(schema):36} {name:24} xgrammar {told[0]:3} llguidance {told[1]:3} json.loads reads it: {told[2]}")
for (bound, name), (first, second, readable) in seen.items():
    escaped, control = name in ("quotes", "line break", "backslash"), name in ("a raw tab", "a raw control character")
    wanted = not readable if bound and (escaped or control) else readable
    if (first, second) != (wanted, readable):
        sys.exit("This has changed.")
PYTHON
