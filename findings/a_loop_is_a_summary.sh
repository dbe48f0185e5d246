#!/usr/bin/env bash
# rouge 1.0.1, lm-eval 0.4.13 (its scores of LongBench), rouge-score 0.1.2. A summary of three sentences is the answer; texts that
# repeat themselves, as models do that fall into a loop, are scored against it.
# Expected: what is said twenty times has a twentieth of the precision, as ROUGE counts words and as rouge-score has it. Seen: rouge
# counts a word once, however often it comes: the summary twenty times over has precision 1 and the score of the summary itself, and
# its first sentence twenty times over scores as high as once, above a summary with a few words of its own. `Rouge(exclusive=False)`
# counts them in ROUGE-1 and 2, but gives ROUGE-L above 1. lm-eval's LongBench takes ROUGE-L of `Rouge()`, of up to 512 tokens
# without a stop. Its README says "slightly different" of the official script.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check setuptools==84.2.1 rouge==1.0.1 jieba==0.42.1 \
  fuzzywuzzy==0.18.0 rouge-score==0.1.2 numpy==2.4.6
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps lm-eval==0.4.13
cd "$here"
env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import importlib.util
import sys
from importlib.metadata import distribution, version

from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

path = distribution("lm-eval").locate_file("lm_eval/tasks/longbench/metrics.py")
spec = importlib.util.spec_from_file_location("metrics", path)
longbench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(longbench)

ANSWER = (
    "The committee met on Monday to discuss the budget. It agreed to raise spending on schools. "
    "Members of the opposition voted against the plan."
)
FIRST = ANSWER.split(". ")[0] + "."
TEXTS = {
    "the summary": ANSWER,
    "the summary, 20 times": " ".join([ANSWER] * 20),
    "its first sentence": FIRST,
    "its first sentence, 20 times": " ".join([FIRST] * 20),
    "words of its own": "On Monday the committee talked about the budget and raised spending on schools, against the votes of others.",
}
KINDS = {"rouge": Rouge(), "rouge, exclusive=False": Rouge(exclusive=False)}
google = RougeScorer(["rouge1", "rougeL"])
print(f"rouge {version('rouge')}, rouge-score {version('rouge-score')}, lm-eval {version('lm-eval')}: precision of ROUGE-1, F of ROUGE-L")
seen = {}
for name, text in TEXTS.items():
    for kind, scorer in KINDS.items():
        scores = scorer.get_scores([text], [ANSWER])[0]
        seen[name, kind] = (scores["rouge-1"]["p"], scores["rouge-l"]["f"])
    scores = google.score(ANSWER, text)
    seen[name, "rouge-score"] = (scores["rouge1"].precision, scores["rougeL"].fmeasure)
    seen[name, "LongBench"] = (0.0, longbench.get_rouge_with_score({"answers": [ANSWER]}, [text])["score"])
    told = "; ".join(f"{kind} {seen[name, kind][0]:.2f} {seen[name, kind][1]:.2f}" for kind in (*KINDS, "rouge-score"))
    print(f"  {name:29} {told}; LongBench {seen[name, 'LongBench'][1]:.2f}")
whole, part = ("the summary", "the summary, 20 times"), ("its first sentence", "its first sentence, 20 times")
alike = all(seen[once, kind] == seen[often, kind] for once, often in (whole, part) for kind in ("rouge", "LongBench"))
above = seen[part[1], "LongBench"][1] > seen["words of its own", "LongBench"][1]
counted = all(seen[often, "rouge-score"][0] < 0.1 and seen[often, "rouge, exclusive=False"][0] < 0.1 for _, often in (whole, part))
counted = counted and seen[part[1], "rouge-score"][1] < seen["words of its own", "rouge-score"][1]
if not alike or not above or not counted:
    sys.exit("This has changed.")
PYTHON
