"""The page of the claims: a table of verdicts, figures, tables and commands, from kept results alone."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taipan import __version__
from taipan.experiments.claims import CLAIMS, Claim, Finding, Kept, judge, load
from taipan.experiments.claims_figures import context_figure, figures
from taipan.io import atomic_write
from taipan.report.page import render

PAGE = "index.html"
SELECTION = "selection"
"""Directory, beside the results, of pages that `taipan inspect` made."""


def write(results: Path, out: Path) -> list[Path]:
    """Write the page, and beside it the pages of selected tokens that lie with the results, and the README's figure.

    Returns the paths of all.

    Args:
        results: directory of what `taipan reproduce` wrote (JSON).
        out: directory of the page.

    Raises:
        DataError: a file of results is damaged.
    """
    known = load(results)
    pages = sorted((results / SELECTION).glob("*.html"))
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for page in pages:
        (out / SELECTION).mkdir(exist_ok=True)
        written.append(Path(shutil.copy2(page, out / SELECTION / page.name)))
    judged = [(claim, judge(claim, known.get(claim.experiment, []))) for claim in CLAIMS]
    values: dict[str, Any] = {
        "title": "The claims of the Taipan paper, tested",
        "version": __version__,
        "made": "",
        "rows": [_row(claim, kept, finding) for claim, found in judged for kept, finding in found],
        "counts": _counts([finding for _, found in judged for _, finding in found]),
        "sections": [_section(claim, found) for claim, found in judged if found[0][0] is not None],
        "missing": [claim.experiment for claim, found in judged if found[0][0] is None],
        "pages": [{"href": f"{SELECTION}/{page.name}", "name": page.stem.replace("-", " ")} for page in pages],
    }
    atomic_write(out / PAGE, render("claims.html.j2", **values).encode())
    for name, svg in context_figure(known.get("perplexity-by-context", [])).items():
        atomic_write(out / name, svg.encode())
        written.append(out / name)
    return [out / PAGE, *written]


def _row(claim: Claim, kept: Kept | None, finding: Finding) -> dict[str, Any]:
    source = ""
    if kept is not None:
        seeds = f"{kept.seeds} seed{'s' * (kept.seeds != 1)}"
        source = ", ".join(part for part in (kept.text, f"scale {kept.scale}", seeds) if part)
    return {
        "place": claim.place,
        "words": claim.words,
        "experiment": claim.experiment,
        "source": source,
        "verdict": finding.verdict,
        "because": finding.because.replace("`", ""),
        "kept": kept is not None,
    }


def _counts(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    verdicts = ("holds", "holds in part", "does not hold", "no result yet")
    return [
        {"verdict": verdict, "count": sum(finding.verdict == verdict for finding in findings)} for verdict in verdicts
    ]


def _section(claim: Claim, found: Sequence[tuple[Kept | None, Finding]]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for kept, _ in found:
        if kept is None:
            continue
        first = next(iter(kept.results.values()))[0]
        parts.append(
            {
                "text": kept.text,
                "command": kept.command,
                "file": kept.file,
                "figures": [
                    {"picture": picture, "caption": caption} for picture, caption in figures(kept, claim.experiment)
                ],
                "tables": kept.tables,
                "facts": _facts(kept, first),
            }
        )
    return {"experiment": claim.experiment, "words": claim.words, "parts": parts}


def _facts(kept: Kept, first: dict[str, Any]) -> str:
    """Seeds, tokens, commit and machine in a sentence; empty for results that do not tell."""
    if "machine" not in first:
        return ""
    commit = first["commits"].get("taipan", {}).get("commit", "unknown")[:10]
    seeds = sorted({result["seed"] for own in kept.results.values() for result in own})
    tokens = f", {first['tokens']:,} tokens a model" if "tokens" in first else ""
    return f"Seeds {', '.join(map(str, seeds))}{tokens}; commit {commit}; {first['machine']['cpu']}."
