#!/usr/bin/env bash
# outlines-core 0.2.14, lm-format-enforcer 0.11.3, xgrammar 0.2.8, llguidance 1.9.1, CPU. Grammars are made of small JSON schemas.
# Expected: what a model is let write satisfies the schema, and a schema that cannot be kept is refused. Seen: outlines-core and
# lm-format-enforcer take any integer for one with `minimum`, `maximum` or `multipleOf`; these and xgrammar let `uniqueItems`
# come twice; lm-format-enforcer takes a full list for one that must be empty, and a text where `prefixItems` wants an integer. No
# word is said. llguidance keeps all of them but `uniqueItems`, which it refuses.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 xgrammar==0.2.8 \
  llguidance==1.9.1 transformers==5.23.0 numpy==2.4.6 outlines-core==0.2.14 lm-format-enforcer==0.11.3 jsonschema==4.26.0
cd "$here"
HF_HUB_OFFLINE=1 env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import json
import re
import sys
from importlib.metadata import version

import jsonschema
import llguidance
import xgrammar
from lmformatenforcer import JsonSchemaParser
from outlines_core.json_schema import build_regex_from_schema

LETTERS = ["<end>", *map(chr, range(1, 128))]
compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(LETTERS, stop_token_ids=[0]))


class Letters:
    """The same tokens, as llguidance asks for them."""

    eos_token_id, bos_token_id, special_token_ids = 0, None, [0]
    tokens = [letter.encode() for letter in LETTERS]

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


letters = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Letters()))


def by_outlines(schema, text):
    return re.fullmatch(build_regex_from_schema(json.dumps(schema)), text) is not None


def by_enforcer(schema, text):
    parser = JsonSchemaParser(schema)
    for letter in text:
        if letter not in parser.get_allowed_characters():
            return False
        parser = parser.add_character(letter)
    return parser.can_end()


def by_xgrammar(schema, text):
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    return all(matcher.accept_token(LETTERS.index(letter)) for letter in text) and matcher.accept_token(0)


def by_llguidance(schema, text):
    matcher = llguidance.LLMatcher(letters, llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher.consume_tokens([LETTERS.index(letter) for letter in text]) and matcher.is_accepting()


def by_jsonschema(schema, text):
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


numbers = {"type": "array", "items": {"type": "integer"}}
CASES = {  # a schema, what satisfies it, and what does not
    "minimum": ({"type": "integer", "minimum": 3}, "4", "2"),
    "maximum": ({"type": "integer", "maximum": 12}, "9", "100"),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, "15", "7"),
    "uniqueItems": ({**numbers, "uniqueItems": True}, "[1, 2]", "[1, 1]"),
    "maxItems 0": ({**numbers, "maxItems": 0}, "[]", "[1]"),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}, '[1, "a"]', '["a", 1]'),
    "type alone": ({"type": "integer"}, "7", '"a"'),
}
LIBRARIES = {"outlines-core": by_outlines, "lm-format-enforcer": by_enforcer, "xgrammar": by_xgrammar, "llguidance": by_llguidance}
print(", ".join(f"{name} {version(name)}" for name in LIBRARIES) + ": may a model write what the schema forbids?")
seen = {}
for what, (schema, right, wrong) in CASES.items():
    if not by_jsonschema(schema, right) or by_jsonschema(schema, wrong):
        sys.exit(f"{schema} means something else to jsonschema.")
    for name, accepts in LIBRARIES.items():
        try:
            seen[what, name] = ("yes" if accepts(schema, wrong) else "no") if accepts(schema, right) else "nor what it allows"
        except Exception:
            seen[what, name] = "refused"
    told = ", ".join(f"{name} {seen[what, name]}" for name in LIBRARIES)
    print(f"  {what:15} {wrong:9} {told}")
bounds = {(what, name): "yes" for what in ("minimum", "maximum", "multipleOf") for name in ("outlines-core", "lm-format-enforcer")}
lists = {("uniqueItems", name): "yes" for name in ("outlines-core", "lm-format-enforcer", "xgrammar")}
lists |= {("uniqueItems", "llguidance"): "refused", ("maxItems 0", "lm-format-enforcer"): "yes", ("prefixItems", "lm-format-enforcer"): "yes"}
expected = dict.fromkeys(seen, "no") | bounds | lists
if seen != expected:
    sys.exit("This has changed.")
PYTHON
