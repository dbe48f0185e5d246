#!/usr/bin/env bash
# uvicorn 0.54.0. Expected: an application that cannot be made ends the server, whatever the number of workers; with one it
# does, with exit status 1. Seen: with --workers 2 each worker that ends so is started again, for ever, and the server
# looks alive to whoever watches its process; nothing listens. Only a worker that ends with status 3 (uvicorn's own, for
# a module that cannot be imported or a port that is taken) ends the server.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check uvicorn==0.54.0
cat > "$here/application.py" <<'PYTHON'
import os


def make():
    with open(os.environ["MADE"], "a") as made:
        made.write("x")
    raise RuntimeError("there is no model here")
PYTHON
cd "$here"
PORT=$("$here/env/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$here/env/bin/python" -c 'import uvicorn; print(f"uvicorn {uvicorn.__version__}")'
for workers in 1 2; do
    : > "made-$workers"
    status=0
    MADE="$here/made-$workers" timeout --signal=TERM 20 "$here/env/bin/python" -m uvicorn --factory application:make \
        --host 127.0.0.1 --port "$PORT" --workers "$workers" > "said-$workers" 2>&1 || status=$?
    echo "  $workers worker(s): made $(wc -c < "made-$workers") times in at most 20 s, exit status $status"
    declare "status_$workers=$status" "made_$workers=$(wc -c < "made-$workers")"
done
[ "$status_1" -eq 1 ] && [ "$made_1" -eq 1 ] || { echo "changed: one worker"; exit 1; }
[ "$status_2" -eq 124 ] && [ "$made_2" -gt 4 ] || { echo "changed: several workers"; exit 1; }
