#!/usr/bin/env bash
# datasets 5.2.0, CPU. A program cleans the rows of a file with `map` and `filter`; then the module that holds its functions is
# edited, and the program is run again. Expected, as the documentation has it (results are used again where data and function
# have the same hash): the edited functions are run. Seen: a function, or an object, of an imported module is hashed by its name
# alone: the rows are those of the module as it was, even where a function of the program itself calls it. `from_generator` gives
# a file as it was when it was first read, and a module's generator as it first was. No word is said. An edited function of the
# program itself is run, and `load_dataset` reads a file that has changed. `disable_caching` helps `map` and `filter`, not
# `from_generator`.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check datasets==5.2.0
cd "$here"
cat > program.py <<'PYTHON'
import json
import sys

import datasets
from cleaning import Tidy, keep, rows, tidy

if sys.argv[1:] == ["anew"]:
    datasets.disable_caching()
datasets.disable_progress_bars()


def own(row):
    return {"text": row["text"] + " VERSION"}


def own_that_calls(row):
    return tidy(row)


def lines():
    with open("text.txt") as file:
        for line in file:
            yield {"text": line.strip()}


old = datasets.load_dataset("text", data_files="old.txt", split="train")
found = {
    "map, a function of the program": old.map(own),
    "load_dataset": datasets.load_dataset("text", data_files="text.txt", split="train"),
    "map, a function of a module": old.map(tidy),
    "map, an object of a module": old.map(Tidy()),
    "map, through the program's own": old.map(own_that_calls),
    "filter, a function of a module": old.filter(keep),
    "from_generator of a file": datasets.Dataset.from_generator(lines),
    "from_generator of a module": datasets.Dataset.from_generator(rows),
}
json.dump({what: data["text"][:] for what, data in found.items()}, sys.stdout)
PYTHON
mv program.py program.txt
cat > compare.py <<'PYTHON'
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

MODULE = '''
def tidy(row):
    return {"text": row["text"] + " VERSION"}
class Tidy:
    def __call__(self, row):
        return tidy(row)
def keep(row):
    return row["text"] != ("one" if "VERSION" == "first" else "two")
def rows():
    yield {"text": "VERSION"}
'''
SETTINGS = os.environ | {"HF_DATASETS_CACHE": "cache", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run(name, *arguments):
    Path("cleaning.py").write_text(MODULE.replace("VERSION", name))
    Path("program.py").write_text(Path("program.txt").read_text().replace("VERSION", name))
    Path("text.txt").write_text(f"a text, {name}\n")
    done = subprocess.run([sys.executable, "program.py", *arguments], env=SETTINGS, capture_output=True, text=True, check=True)
    if done.stderr:
        print(f"  said: {done.stderr.strip()}")
    return json.loads(done.stdout)


Path("old.txt").write_text("one\ntwo\n")
print(f"datasets {version('datasets')}: a program is run, its module and its file are edited, and it is run again")
first, second, anew = run("first"), run("second"), run("second", "anew")
seen = {}
for what, rows in second.items():
    seen[what] = ["old" if found == first[what] else "new" for found in (rows, anew[what])]
    print(f"  {what:32} {first[what]}, then {rows}: {seen[what][0]}; caching disabled: {seen[what][1]}")
old = {"map, a function of a module", "map, an object of a module", "map, through the program's own", "filter, a function of a module"}
generated = {"from_generator of a file", "from_generator of a module"}
expected = {what: ["old" if what in old | generated else "new", "old" if what in generated else "new"] for what in seen}
if len(seen) != 8 or seen != expected:
    sys.exit("This has changed.")
PYTHON
env/bin/python compare.py
