"""What `taipan.hardware.tune_allocator` buys: a forward and backward over tensors of 8 and 32 MB, with and without it.

    python benchmarks/allocator.py

Each setting runs in processes of its own, alternating, one thread. Figures: docs/decisions/0002-allocator.md.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

SETTINGS = ("plain", "tuned")
TOKENS, WIDTH, INNER, LAYERS = 4096, 512, 2048, 3


def measure(setting: str, steps: int) -> dict[str, float]:
    """Time and processor time of a step, its page faults, and the peak of memory, in this process."""
    import torch
    from torch.nn.functional import silu

    from taipan import hardware

    if setting == "tuned" and not hardware.tune_allocator():
        raise SystemExit("this allocator cannot be tuned (not glibc's)")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    up = torch.randn(WIDTH, INNER).requires_grad_()
    down = torch.randn(INNER, WIDTH).requires_grad_()
    x = torch.randn(TOKENS, WIDTH) * 0.1

    def step() -> None:
        h = x
        for _ in range(LAYERS):
            gated = silu(h @ up)
            h = h + (gated * gated.sigmoid()) @ down * 1e-3
        h.square().mean().backward()
        up.grad = down.grad = None

    step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    times: list[float] = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "ms": statistics.median(times) * 1e3,
        "user ms": (after.ru_utime - before.ru_utime) / steps * 1e3,
        "system ms": (after.ru_stime - before.ru_stime) / steps * 1e3,
        "page faults": (after.ru_minflt - before.ru_minflt) / steps,
        "peak MB": hardware.peak_rss_bytes() / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=SETTINGS, help="measure one setting in this process and print it as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.steps)))
        return
    results: dict[str, list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
    for _ in range(arguments.rounds):
        for setting in SETTINGS:
            command = [sys.executable, __file__, "--one", setting, "--steps", str(arguments.steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[setting].append(json.loads(output))
    columns = list(results["plain"][0])
    print(f"{'':8}" + "".join(f"{column:>14}" for column in columns))
    for setting, rounds in results.items():
        print(f"{setting:8}" + "".join(f"{statistics.median(r[c] for r in rounds):14,.0f}" for c in columns))
    # processor time, because it depends less on what else the machine is doing
    processor = {setting: [r["user ms"] + r["system ms"] for r in rounds] for setting, rounds in results.items()}
    ratios = [tuned / plain for plain, tuned in zip(*processor.values(), strict=True)]
    print("processor time of a tuned step over a plain one, by round: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
