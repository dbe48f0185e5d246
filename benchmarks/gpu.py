"""What one GPU makes of Taipan, in under eight minutes: exactness, training, speed, memory, and others beside it.

benchmarks/gpu.sh prepare                        fetch what the machine with the GPU will not have
benchmarks/gpu.sh run                            there: everything, without a network
python benchmarks/gpu.py --device cpu --quick    everything, small, on a CPU

Every part runs in a process of its own with a limit of time, so that a kernel that crashes or hangs takes no other part
along. What a part finds is in the file of results from the moment it is found. docs/gpu.md names the targets.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_parts import PARTS, Bench

PATIENCE = 10
"""So many times that long on a CPU."""
UNTIMED = ("exactness", "curve")
"""Parts beside which the CPU may work: it makes its own loss curve meanwhile."""


def run_part(name: str, device: str, quick: bool, out: Path) -> None:
    """One part, in this process; a line of JSON for each finding."""
    with out.open("a", encoding="utf-8") as file:

        def write(**found: Any) -> None:
            file.write(json.dumps(found, default=str) + "\n")
            file.flush()

        try:
            PARTS[name][0](Bench(torch.device(device), quick, write))
        except Exception:
            write(failed=traceback.format_exc()[-2000:])
            raise


def findings(out: Path) -> list[dict[str, Any]]:
    """Whole lines of a part; the last one may have been cut off."""
    if not out.is_file():
        return []
    lines = out.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def start(name: str, device: str, quick: bool, out: Path, threads: int | None = None) -> subprocess.Popen[bytes]:
    options = ["--part", name, "--device", device, "--json", str(out)] + ["--quick"] * quick
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    return subprocess.Popen([sys.executable, __file__, *options], env=environment)


def finish(process: subprocess.Popen[bytes], seconds: float) -> str:
    """How a part ended, after so many seconds at most."""
    try:
        code = process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"stopped after {seconds:.0f} s"
    return "done" if code == 0 else f"failed with {code}"


def run_all(names: Sequence[str], device: str, quick: bool, seconds: float, target: Path) -> bool:
    """All parts one after the other; the file is written anew after each. Whether all were done."""
    began = time.monotonic()
    record: dict[str, Any] = {"device": device, "quick": quick, "parts": {}}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        beside: subprocess.Popen[bytes] | None = None
        for name in names:
            if device != "cpu" and name == UNTIMED[0]:
                beside = start("curve", "cpu", quick, place / "cpu", threads=max(1, (os.cpu_count() or 2) // 2))
            if beside is not None and name not in UNTIMED:
                record["parts"]["curve on the CPU"] = {"ended": finish(beside, 0), "found": findings(place / "cpu")}
                beside = None
            left = seconds - (time.monotonic() - began)
            part = time.monotonic()
            limit = min(PARTS[name][1] * (1 if device == "cuda" else PATIENCE), left)
            ended = finish(start(name, device, quick, place / name), limit) if left > 0 else "no time"
            took = time.monotonic() - part
            record["parts"][name] = {"ended": ended, "seconds": took, "found": findings(place / name)}
            record["seconds"] = time.monotonic() - began
            _save(record, target)
            print(f"{name}: {ended}, {took:.0f} s", flush=True)
        if beside is not None:
            finish(beside, 0)
    print("\n".join(summary(record)))
    return all(part["ended"] == "done" for name, part in record["parts"].items() if name in names)


def _save(record: dict[str, Any], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = target.with_suffix(".part")
    whole.write_text(json.dumps(record, indent=1), encoding="utf-8")
    whole.replace(target)


def summary(record: dict[str, Any]) -> Iterator[str]:
    """What was aimed at and reached, in words."""
    found = {name: part["found"] for name, part in record["parts"].items()}
    checked = [row for row in found.get("exactness", ()) if "ok" in row or "failed" in row]
    yield f"exact: {sum(row.get('ok', False) for row in checked)} of {len(checked)} cases"
    for row in found.get("training", ()):
        if "share_of_peak" in row:
            yield f"training, {row['model']}: {row['share_of_peak']:.1%} of the peak (target {row['target']:.0%})"
    for row in found.get("decoding", ()):
        if "way" in row:
            share = f"{row['share_of_bandwidth']:.1%} of the bandwidth (target {row['target']:.0%})"
            yield f"decoding, {row['model']}, {row['way']}: {share}"
    for row in found.get("peers", ()):
        if row.get("subject") not in (None, "taipan") and "seconds" in row:
            yield f"{row['work']}, {row['subject']}: {row['times_as_long_as_taipan']:.2f} × our time"
    theirs, ours = (
        {row["step"]: row["loss"] for row in found.get(name, ()) if "step" in row}
        for name in ("curve on the CPU", "curve")
    )
    common = sorted(theirs.keys() & ours.keys())
    if common:
        apart = max(abs(theirs[step] - ours[step]) for step in common)
        yield f"loss: {len(common)} steps beside the CPU's, at most {apart:.4f} nats apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small and once, to see that it runs")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--seconds", type=float, default=470, help="of everything")
    parser.add_argument("--json", type=Path, default=Path("build/gpu.json"), help="file of results")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        run_part(asked.part, asked.device, asked.quick, asked.json)
    elif not run_all(asked.parts, asked.device, asked.quick, asked.seconds, asked.json):
        sys.exit(1)


if __name__ == "__main__":
    main()
