#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3. Chats are tokenized with a template whose `generation` block holds what the assistant says,
# and `return_assistant_tokens_mask=True`. Two tokenizers give the same ids; one has `ByteLevel(trim_offsets=True)` behind it, the
# default there, which GPT-NeoX's (Mamba's) and Llama 3's files have as well. It leaves spaces out of the places of tokens.
# Expected: the tokens of the blocks are marked, whatever the tokenizer. Seen with that one: where a block begins with a space (of
# the template, or of what is said), no token from there to the end of the chat is marked; where a block ends with a space, all of
# the rest is, what the user says too. No warning: a place that is not found is taken for one that was cut off.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 \
  numpy==2.4.6 jinja2==3.1.6
cd "$here"
env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TURN = "{% if message.role == 'assistant' %}ANSWER{% else %}User: {{ message.content }}{% endif %}{{ '\\n' }}"
CHAT = "{% for message in messages %}" + TURN + "{% endfor %}"
TEMPLATES = {
    "space before the block": "Assistant: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}",
    "space in the block": "Assistant:{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}",
    "no end token in the block": "Assistant: {% generation %}{{ message.content }}{% endgeneration %}",
}
FIRST = {"plain": "It is Paris.", "space before": " It is Paris.", "space behind": "It is Paris. "}


def tokenizer(trim):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    backend.decoder = decoders.ByteLevel()
    texts = ["User: What is it? Tell me more.\nAssistant: It is Paris. The town has two rivers.\n"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


print(f"transformers {version('transformers')}, tokenizers {version('tokenizers')}: what is marked as the assistant's")
kinds, seen = {trim: tokenizer(trim) for trim in (False, True)}, {}
for name, answer in TEMPLATES.items():
    for first, said in FIRST.items():
        turns = ["What is it?", said, "Tell me more.", "The town has two rivers."]
        chat = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(turns)]
        ids = []
        for trim, kind in kinds.items():
            told = kind.apply_chat_template(
                chat, chat_template=CHAT.replace("ANSWER", answer), return_dict=True, return_assistant_tokens_mask=True
            )
            marked = [token for token, mark in zip(told["input_ids"], told["assistant_masks"], strict=True) if mark]
            seen[name, first, trim] = kind.decode(marked)
            ids.append(told["input_ids"])
            print(f"  {name}, {first}, trim_offsets={trim}: {len(marked)} of {len(ids[-1])} tokens: {seen[name, first, trim]!r}")
        assert ids[0] == ids[1]


def right(name, first, trim):
    """Whether what is marked is what the blocks hold; a space before may be part of a first token."""
    end = "<end>" * (name != "no end token in the block")
    return seen[name, first, trim].replace(" ", "") == f"ItisParis.{end}Thetownhastworivers.{end}"


expected = dict.fromkeys(seen, True)
for name, first, trim in seen:
    if trim and (name == "space in the block" or first == "space before"):
        expected[name, first, trim] = bool(seen[name, first, trim])
    if trim and name == "no end token in the block" and first == "space behind":
        expected[name, first, trim] = "User: Tell me more." not in seen[name, first, trim]
if {case: right(*case) for case in seen} != expected:
    sys.exit("This has changed.")
PYTHON
