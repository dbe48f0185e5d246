#!/usr/bin/env bash
# lm-eval 0.4.13. A task of multiple choice whose prompt is a template ("{{question}}"), as in most of its own tasks,
# and a question that consists of digits. Expected: the question as prompt, the choices as continuations. Seen: the
# rendered prompt is evaluated as a number and taken for a task whose *contexts* are the choices: the question is not
# asked at all, the choices stand as prompts, the number of the right one as continuation; no word is said. And a task of
# kind `loglikelihood` puts nothing between prompt and continuation, where multiple choice puts its `target_delimiter`:
# "a clear" + "stone" is asked as "a clearstone".
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check lm-eval==0.4.13 datasets==5.2.0 numpy==2.4.6 torch==2.13.0
HF_HUB_OFFLINE=1 "$here/env/bin/python" - 2> /dev/null <<'PYTHON'
import sys
from importlib.metadata import version

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


class Task(ConfigurableTask):
    def __init__(self, questions, **options):
        self.questions = questions
        super().__init__(config={"task": "mine", "test_split": "test", "metric_list": ACCURACY, **options})

    def download(self, *args, **kwargs):
        self.dataset = {"test": Dataset.from_list(self.questions)}

    def asked(self):
        self.build_all_requests()
        return [instance.arguments for instance in self.instances]


choice = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
words = Task([{"question": "After 12 comes", "choices": ["13", "14"], "gold": 0}], **choice).asked()
digits = Task([{"question": "12", "choices": ["13", "14"], "gold": 0}], **choice).asked()
likely = {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{word}}"}
word = Task([{"context": "a clear", "word": "stone"}], **likely).asked()
print(f"lm-eval {version('lm-eval')}")
print(f"'After 12 comes': {words}")
print(f"'12':             {digits}")
print(f"'a clear', kind loglikelihood: {word}")
expected = ([("After 12 comes", " 13"), ("After 12 comes", " 14")], [("13", " 0"), ("14", " 0")], [("a clear", "stone")])
sys.exit(None if (words, digits, word) == expected else "this has changed")
PYTHON
