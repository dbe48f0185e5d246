#!/usr/bin/env bash
# huggingface_hub 2.4.0. HF_HUB_OFFLINE=1 is set so that nothing is fetched from the hub, and a server of one's own runs
# on this machine. Expected: a client with base_url="http://127.0.0.1:PORT" asks it. Seen: OfflineModeIsEnabled before
# any connection; the same request goes through without the variable. `transformers chat` is such a client, and so it
# cannot talk to the `transformers serve` beside it.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check huggingface_hub==2.4.0
cat > "$here/ask.py" <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
from huggingface_hub import InferenceClient


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "hello"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = json.dumps({"id": "1", "created": 0, "model": "m", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = InferenceClient(base_url=f"http://127.0.0.1:{server.server_address[1]}")
try:
    said = client.chat_completion([{"role": "user", "content": "hi"}]).choices[0].message.content
except Exception as error:
    said = type(error).__name__
print(said)
PYTHON
online=$("$here/env/bin/python" "$here/ask.py")
offline=$(HF_HUB_OFFLINE=1 "$here/env/bin/python" "$here/ask.py")
echo "huggingface_hub 2.4.0, a server on 127.0.0.1: $online; with HF_HUB_OFFLINE=1: $offline"
[ "$online" = hello ] && [ "$offline" = OfflineModeIsEnabled ] || { echo "this has changed"; exit 1; }
