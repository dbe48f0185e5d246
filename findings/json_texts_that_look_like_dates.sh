#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1. Expected: a JSON string stays a string. Seen: where every string of a column
# looks like a date, the column becomes timestamps, and the texts come back as datetime objects, "2020-01-01" with a
# time of day it never had. One string that is no date and the column is text. So two shards of one corpus get
# different types by chance.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$here"
HF_HOME="$here/cache" HF_HUB_OFFLINE=1 env/bin/python - <<'PYTHON'
import json
from pathlib import Path

import datasets

datasets.disable_progress_bars()


def load(*texts):
    name = f"{abs(hash(texts))}.jsonl"
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = datasets.load_dataset("json", data_files=name, split="train")
    return data.features["text"].dtype, [row["text"] for row in data]


dates, mixed = load("2020-01-01", "2020-01-02T03:04:05"), load("2020-01-01", "Yesterday")
print(f"datasets {datasets.__version__}")
print(f"  only dates: {dates}")
print(f"  dates and another text: {mixed}")
if dates[0] != "timestamp[s]" or isinstance(dates[1][0], str) or mixed != ("string", ["2020-01-01", "Yesterday"]):
    raise SystemExit("changed")
PYTHON
