#!/usr/bin/env bash
# litellm 1.110.2, openai 3.57.0. A server of OpenAI's form streams a hundred and fifty equal pieces of text, as a small model
# does that has begun to repeat itself. Expected: what stands between client and server hands on what is streamed, as the openai
# client does. Seen: after a hundred of them, if a piece has more than two characters, litellm raises in mid-stream (a
# MidStreamFallbackError: "The model is repeating the same chunk"), and the rest is lost; without `stream` the text comes whole.
# The number is REPEATED_STREAMING_CHUNK_LIMIT of its environment.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check litellm==1.110.2 openai==3.57.0
cat > "$here/streams.py" <<'PYTHON'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import litellm
from openai import OpenAI

PIECES = 150


class Server(BaseHTTPRequestHandler):
    """Answers with the last message, so many times; streamed, each is a piece."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        piece = asked["messages"][-1]["content"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if asked.get("stream") else "application/json")
        self.end_headers()
        if not asked.get("stream"):
            message = {"role": "assistant", "content": piece * PIECES}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.wfile.write(json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m",
                                         "choices": [choice]}).encode())
            return
        for delta, reason in (({"role": "assistant"}, None), *[({"content": piece}, None)] * PIECES, ({}, "stop")):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
client = OpenAI(base_url=url, api_key="none", max_retries=0)


def by_openai(messages, **choice):
    return client.chat.completions.create(model="m", messages=messages, **choice)


def by_litellm(messages, **choice):
    return litellm.completion(model="openai/m", api_base=url, api_key="none", num_retries=0, messages=messages, **choice)


def streamed(ask, piece):
    pieces, error = 0, None
    try:
        for chunk in ask([{"role": "user", "content": piece}], stream=True):
            pieces += bool(chunk.choices and chunk.choices[0].delta.content)
    except Exception as raised:
        error = type(raised).__name__
    return pieces, error


def whole(ask, piece):
    return ask([{"role": "user", "content": piece}]).choices[0].message.content == piece * PIECES


print(f"litellm {version('litellm')}, openai {version('openai')}: what arrives of a stream of {PIECES} equal pieces")
seen = {}
for piece in ("00", "---", " the", "| a "):
    for name, ask in (("openai", by_openai), ("litellm", by_litellm)):
        seen[name, piece] = arrived, error = streamed(ask, piece)
        complete = whole(ask, piece)
        print(f"  {name:8} {piece!r:7} {arrived} pieces, {error or 'no error'}; not streamed, {'whole' if complete else 'cut'}")
        if not complete:
            sys.exit("This has changed.")
long = [seen["litellm", piece] for piece in ("---", " the", "| a ")]
if not all(arrived <= 100 and error for arrived, error in long):
    sys.exit("This has changed.")
if any(found != (PIECES, None) for (name, piece), found in seen.items() if name == "openai" or piece == "00"):
    sys.exit("This has changed.")
PYTHON
cd "$here"
# its list of prices comes with the package; without this it is asked for from elsewhere
LITELLM_LOCAL_MODEL_COST_MAP=True env/bin/python -W ignore streams.py 2> errors || { code=$?; cat errors >&2; exit "$code"; }
