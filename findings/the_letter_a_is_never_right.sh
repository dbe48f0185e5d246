#!/usr/bin/env bash
# inspect-ai 0.3.285. Answers are scored by its `exact` and `f1` scorers, which compare what an answer says, and by `match` with
# `numeric=True`, which compares its last number. Expected: an answer that is the target letter for letter is right, and another
# number or expression is wrong. Seen: `exact` and `f1` take "a", "an" and "the" out of both texts, and then call an empty target
# wrong: the answer A to a question whose target is A scores nothing, where B, C and D score; of more letters than one A does not
# count. Unless a word is a number they take its punctuation away: -5 is 5 (a minus goes in any case), 1/2 is 12, 10:30 is 1030,
# C# is C. `match` reads no number that a unit, a colon or a sign of per cent touches, though it reads one behind $. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check inspect-ai==0.3.285
cd "$here"
env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import asyncio
import sys
from importlib.metadata import version

from inspect_ai.model import ModelOutput
from inspect_ai.scorer import Target, exact, f1, match
from inspect_ai.solver import TaskState


def score(scorer, answer, target):
    output = ModelOutput.from_content("mockllm/model", answer)
    state = TaskState(model="mockllm/model", sample_id=1, epoch=1, input="?", messages=[], output=output)
    return {"C": 1.0, "I": 0.0}.get(value := asyncio.run(scorer(state, Target(target))).value, value)


WORDS = {  # answer and target: what one would score
    ("B", "B"): 1, ("D", "D"): 1, ("B", "C"): 0, ("5", "-4"): 0, ("1.5", "15"): 0, ("the boat", "Boat."): 1,
    ("A", "A"): 1, ("(A)", "A"): 1, ("B", "A, B"): 0, ("-5", "5"): 0, ("-5 degrees", "5 degrees"): 0,
    ("1/2", "12"): 0, ("10:30", "1030"): 0, ("C#", "C"): 0,
}
NUMBERS = {
    ("It is 18.", "18"): 1, ("It is $18", "18"): 1, ("It is 1,800 grams", "1800"): 1, ("It is -18", "18"): 0,
    ("It is 18%", "18"): 1, ("It is 18kg", "18"): 1, ("Answer:18", "18"): 1, ("x=18", "18"): 1,
}
print(f"inspect-ai {version('inspect-ai')}: scores of an answer, and what one expects")
wrong = {}
for names, cases in ((("exact", "f1"), WORDS), (("match",), NUMBERS)):
    for (answer, target), expected in cases.items():
        found = {name: score({"exact": exact(), "f1": f1(), "match": match(numeric=True)}[name], answer, target) for name in names}
        wrong[answer, target] = all(value != expected for value in found.values())
        told = ", ".join(f"{name} {value}" for name, value in found.items())
        print(f"  {answer!r:20} for {target!r:12} expected {expected}: {told}")
if list(wrong.values()) != [False] * 6 + [True] * 8 + [False] * 4 + [True] * 4:
    sys.exit("This has changed.")
PYTHON
