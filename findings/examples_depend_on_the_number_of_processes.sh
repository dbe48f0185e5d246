#!/usr/bin/env bash
# lm-eval 0.4.13. Twenty questions with two examples each before them, drawn with the fixed seed of the harness (1234).
# Expected: the seed decides which examples stand before a question, so that a score does not depend on how the questions
# are shared among processes, and a question that is asked alone (`samples`) is the prompt that it was in the whole
# task. Seen: examples are drawn one question after the other from one generator, anew in every process: asked by two
# processes, as `accelerate launch` does it, 19 of 20 prompts are others. `limit` keeps them, since it asks the first ones.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check lm-eval==0.4.13 datasets==5.2.0 \
  numpy==2.4.6 torch==2.13.0
HF_HUB_OFFLINE=1 "$here/env/bin/python" - 2> /dev/null <<'PYTHON'
import sys
from importlib.metadata import version

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

QUESTIONS = [{"question": f"question {number}", "choices": ["yes", "no"], "gold": number % 2} for number in range(20)]
EXAMPLES = [{**question, "question": f"example {number}"} for number, question in enumerate(QUESTIONS)]


class Task(ConfigurableTask):
    def __init__(self):
        options = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"}
        splits = {"task": "mine", "test_split": "test", "fewshot_split": "train", "num_fewshot": 2}
        accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
        super().__init__(config={**splits, **options, "doc_to_target": "gold", "metric_list": accuracy})

    def download(self, *args, **kwargs):
        self.dataset = {"test": Dataset.from_list(QUESTIONS), "train": Dataset.from_list(EXAMPLES)}


def prompts(**choice):
    task = Task()
    task.set_fewshot_seed(1234)
    task.build_all_requests(**choice)
    return {instance.doc["question"]: instance.args[0] for instance in task.instances}


whole, again = prompts(), prompts()
two = prompts(rank=0, world_size=2) | prompts(rank=1, world_size=2)
first, some = prompts(limit=5), prompts(samples=[3, 7])
print(f"lm-eval {version('lm-eval')}: prompts that are those of the whole task asked by one process")
seen = {}
for name, found in (("again", again), ("two processes", two), ("limit=5", first), ("samples=[3, 7]", some)):
    seen[name] = sum(whole[question] == prompt for question, prompt in found.items()), len(found)
    print(f"  {name:15} {seen[name][0]} of {seen[name][1]}")
print(f"  question 3: {whole['question 3']!r}, of two processes {two['question 3']!r}")
if not (seen["again"] == (20, 20) and seen["limit=5"] == (5, 5) and seen["two processes"][0] < 10 and seen["samples=[3, 7]"][0] < 2):
    sys.exit("This has changed.")
PYTHON
