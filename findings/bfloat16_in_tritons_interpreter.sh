#!/usr/bin/env bash
# triton 3.9.0, TRITON_INTERPRET=1, CPU. Expected: the interpreter computes in bfloat16 what a GPU does, as it does in
# float16, or refuses. Seen: it holds bfloat16 as 16-bit integers and computes with those: 1 + 1 is 1.7e38, −3 is larger
# than 5, the product of two identity matrices has 1.5e8 on its diagonal. Only what a kernel casts to float32 on loading
# is right, and a store cuts off where a GPU rounds: 1.005859375 becomes 1 instead of 1.0078125. float16 is right in all.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps triton==3.9.0
cat >"$here/kernels.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def add(x, y, out, wide: tl.constexpr):
    at = tl.arange(0, 4)
    a, b = tl.load(x + at), tl.load(y + at)
    if wide:
        a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(out + at, a + b)


@triton.jit
def larger(x, y, out):
    at = tl.arange(0, 4)
    tl.store(out + at, tl.where(tl.load(x + at) > tl.load(y + at), 1.0, 0.0))


@triton.jit
def copy(x, out):
    at = tl.arange(0, 4)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def product(x, y, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


def results(dtype):
    x, y = torch.tensor([1, 1.5, -3, 0.25]).to(dtype), torch.tensor([1, 2, 5, -4.0]).to(dtype)
    out, wide, seen, square = torch.zeros(4), torch.zeros(4), torch.zeros(4), torch.zeros(16, 16)
    stored = torch.zeros(4, dtype=dtype)
    add[(1,)](x, y, out, False)
    add[(1,)](x, y, wide, True)
    larger[(1,)](x, y, seen)
    copy[(1,)](torch.full((4,), 1.005859375), stored)
    eye = torch.eye(16).to(dtype)
    product[(1,)](eye, eye, square)
    return {
        "x + y": out.tolist(),
        "x + y, cast to float32 first": wide.tolist(),
        "x > y": seen.tolist(),
        "1.005859375 stored": stored[0].item(),
        "diagonal of I I": square[0, 0].item(),
    }


print(f"triton {triton.__version__}, torch {torch.__version__}")
right = [2.0, 3.5, 2.0, -3.75]
for dtype in (torch.float16, torch.bfloat16):
    found = results(dtype)
    for name, value in found.items():
        print(f"  {dtype}, {name}: {value}")
    narrow = dtype == torch.bfloat16
    ok = (
        found["x + y, cast to float32 first"] == right
        and (found["x + y"] == right) != narrow
        and (found["x > y"] == [0, 0, 0, 1]) != narrow
        and found["1.005859375 stored"] == (1.0 if narrow else 1.005859375)
        and (found["diagonal of I I"] == 1) != narrow
    )
    if not ok:
        raise SystemExit(f"changed in {dtype}")
PYTHON
cd "$here"
TRITON_INTERPRET=1 "$here/env/bin/python" kernels.py
