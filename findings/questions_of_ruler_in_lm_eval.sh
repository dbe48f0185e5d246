#!/usr/bin/env bash
# lm-eval 0.4.13, tasks ruler_qa_squad and ruler_qa_hotpot (RULER). Expected: a question is answered if any of its accepted
# answers is given, as RULER has it (its issue 15), and the document that holds the answer lies at another place in every
# sample. Seen: the score is the share of the accepted answers that were given, so that "in 1066" scores a half where "in 1066" and
# "in the year 1066" are accepted. And documents are shuffled with one seed for every sample: at a length the answer lies at
# one place in all of them, and at another length at another one.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check lm-eval==0.4.13 datasets==5.2.0 \
  transformers==5.23.0 numpy==2.4.6 torch==2.13.0
HF_HUB_OFFLINE=1 "$here/env/bin/python" - 2> /dev/null <<'PYTHON'
import random
import sys
from importlib.metadata import version

from lm_eval.tasks.ruler.common_utils import process_results_part
from lm_eval.tasks.ruler.qa_utils import generate_samples
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

print(f"lm-eval {version('lm-eval')}: questions of RULER")
scores = []
for accepted in (["in 1066"], ["in 1066", "in the year 1066"], ["1066", "in 1066", "in the year 1066", "the year 1066"]):
    score = process_results_part({"outputs": accepted, "max_length": 4096}, [" It was in 1066."])["4096"]
    scores.append(score)
    print(f'  "It was in 1066.", where one of {accepted} is right: {score}')

words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
documents = [f"Town {town} has a mayor named {town}. " + "It lies by a river. " * 7 for town in range(1000)]
questions = [{"query": f"Who is mayor of town {town}?", "outputs": [str(town)], "context": [town]} for town in range(100)]
places = {}
for length in (1024, 2048, 4096):
    random.seed(length)
    found = set()
    for sample in generate_samples(tokenizer, documents, questions, length, num_samples=100):
        text = sample["input"]
        found.add((text[: text.index(f"Town {sample['index']} has")].count("Document "), text.count("Document ")))
    places[length] = found
    print(f"  100 samples of {length} tokens: the answer's document is " + " or ".join(f"{a} of {b}" for a, b in sorted(found)))
if scores != [1.0, 0.5, 0.5] or not all(len(found) == 1 for found in places.values()):
    sys.exit("This has changed.")
if len({round(place / of, 1) for found in places.values() for place, of in found}) < 2:
    sys.exit("This has changed.")
PYTHON
