"""The page of the claims: verdicts from results that are known, and what is said where there is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from taipan.data.hidden_keys import KINDS
from taipan.errors import DataError
from taipan.experiments.claims import CLAIMS, FOUR, Finding, Kept, Verdict, judge, load
from taipan.experiments.claims_figures import figures
from taipan.experiments.claims_report import write
from taipan.experiments.registry import ENTRIES
from taipan.experiments.retention import EVICTIONS, WAYS
from tests.command import run

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SEEN = {
    "seed": 1,
    "tokens": 1000,
    "context": 512,
    "steps": 100,
    "machine": {"cpu": "a CPU"},
    "commits": {"taipan": {"commit": "0123456789ab"}},
}


def kept(results: dict[str, Any], *, seeds: int = 3, **more: Any) -> Kept:
    """Results with so many seeds, all of one value."""
    own = {name: [{**SEEN, **result, "seed": seed} for seed in range(seeds)] for name, (result,) in results.items()}
    return Kept("some.json", "code", "small", "the command", own, more, ())


def found(experiment: str, results: Kept) -> Finding:
    (claim,) = [claim for claim in CLAIMS if claim.experiment == experiment]
    ((_, finding),) = judge(claim, [results])
    return finding


def contexts(**ends: tuple[float, float]) -> dict[str, Any]:
    """Bits per byte of each architecture at 512 and at 8192 tokens."""
    return {
        name: [
            {
                "by_context": [{"context": 512, "bits_per_byte": low}, {"context": 8192, "bits_per_byte": high}],
                "by_position": [
                    {"start": 0, "stop": 64, "bits_per_byte": low},
                    {"start": 512, "stop": 1024, "bits_per_byte": high},
                ],
                "documents": 4,
                "length": 9000,
            }
        ]
        for name, (low, high) in ends.items()
    }


def bits(**values: float) -> dict[str, Any]:
    return {name: [{"bits_per_byte": value}] for name, value in values.items()}


@pytest.mark.parametrize(
    ("taipan", "transformer", "verdict"),
    [
        ((1.2, 1.1), (1.3, 3.0), "holds"),
        ((1.4, 1.3), (1.3, 3.0), "holds in part"),  # not the lowest inside
        ((1.2, 1.4), (1.3, 3.0), "holds in part"),  # the lowest, but not flat
        ((1.2, 1.9), (1.3, 3.0), "does not hold"),
        ((1.2, 1.1), (1.3, 1.2), "holds in part"),  # the Transformer does not break
    ],
)
def test_loss_by_context(taipan: tuple[float, float], transformer: tuple[float, float], verdict: Verdict) -> None:
    results = contexts(transformer=transformer, mamba2=(1.5, 1.6), jamba=(1.25, 2.0), taipan=taipan)
    finding = found("perplexity-by-context", kept(results))
    assert finding.verdict == verdict
    assert f"Taipan: {taipan[1]:.3f}" in finding.because


def long(results: dict[str, Any], **points: dict[int, float]) -> dict[str, Any]:
    """Results of `contexts` with the end of two long texts: bits per byte by context, and a shorter reading of it."""
    for name, (own,) in results.items():
        curve = [{"context": context, "bits_per_byte": bits} for context, bits in points[name].items()]
        own["long"] = {"a note": {"scored": 9, "by_context": curve[:1]}, "books": {"scored": 9, "by_context": curve}}
    return results


@pytest.mark.parametrize(
    ("mamba2", "transformer", "verdict"),
    [
        (1.4, 3.0, "holds"),
        (1.1, 3.0, "holds in part"),  # Mamba-2 is the lowest at the end
        (1.4, 1.15, "holds in part"),  # the Transformer is, as far as it was read
    ],
)
def test_of_long_texts_the_one_read_furthest_decides(mamba2: float, transformer: float, verdict: Verdict) -> None:
    results = long(
        contexts(**dict.fromkeys(FOUR, (9.0, 9.0))),
        taipan={512: 1.2, 65536: 1.2, 1048576: 1.18},
        mamba2={512: 1.3, 65536: 1.4, 1048576: mamba2},
        jamba={512: 1.25, 65536: 2.0},
        transformer={512: 1.3, 65536: transformer},
    )
    finding = found("perplexity-by-context", kept(results))
    assert finding.verdict == verdict
    assert "at 1,048,576 (" in finding.because
    assert "Taipan: 1.180; Transformer++ only to 65,536; Jamba only to 65,536). Text: the end of books." in (
        finding.because
    )


def latency(**seconds: tuple[float, float]) -> dict[str, Any]:
    points = {
        name: [
            {"length": length, "seconds": [value, value, 9 * value], "memory": [2**20] * 3}
            for length, value in zip((16384, 32768), own, strict=True)
        ]
        for name, own in seconds.items()
    }
    return {name: [{"generate": own, "prefill": own}] for name, own in points.items()}


@pytest.mark.parametrize(
    ("taipan", "verdict"),
    [((1.0, 2.0), "holds"), ((2.0, 4.0), "holds in part"), ((1.0, 4.0), "does not hold"), ((9, 18), "does not hold")],
)
def test_latency_by_length(taipan: tuple[float, float], verdict: Verdict) -> None:
    results = kept(latency(transformer=(4.0, 16.0), mamba2=(1.2, 2.4), jamba=(3.0, 9.0), taipan=taipan))
    finding = found("latency-by-length", results)
    assert finding.verdict == verdict
    assert f"{16.0 / taipan[1]:.1f} times as long as Taipan" in finding.because
    if verdict == "holds":
        assert len(figures(results, "latency-by-length")) == 3


@pytest.mark.parametrize(
    ("learned", "thirty", "chance", "verdict"),
    [(1.25, 1.23, 1.4, "holds"), (1.25, 1.10, 1.4, "holds in part"), (1.45, 1.44, 1.4, "does not hold")],
)
def test_budgets(learned: float, thirty: float, chance: float, verdict: Verdict) -> None:
    values = {"C = 0.00": 1.5, "C = 0.15": learned, "C = 0.30": thirty, "C = 1.00": 1.1}
    values |= {"C = 0.15, by chance": chance, "C = 0.15, every k-th": 1.5}
    larger = {f"{name}, larger": value for name, value in values.items()}
    results = kept(bits(**values, **larger))
    finding = found("capacity", results)
    assert finding.verdict == verdict
    if verdict == "holds":
        assert len(figures(results, "capacity")) == 2


@pytest.mark.parametrize(
    ("jamba", "own", "verdict", "because"),
    [
        (1.25, 1.30, "holds", "Of Jamba's lead over Mamba-2, recall, lookahead: 0.80."),
        (1.25, 1.45, "does not hold", "Of Jamba's lead over Mamba-2, recall, lookahead: 0.20."),
        (1.49, 1.40, "holds", "Jamba's lead over Mamba-2 is 0.7%, too little to keep."),
        (1.49, 1.495, "holds in part", "too little to keep."),
        (1.51, 1.52, "does not hold", "too little to keep."),
    ],
)
def test_a_share_of_a_lead_wants_a_lead(jamba: float, own: float, verdict: Verdict, because: str) -> None:
    finding = found("gate-settings", kept(bits(**{"mamba2": 1.5, "jamba": jamba, "recall, lookahead": own})))
    assert finding.verdict == verdict
    assert because in finding.because


def test_copying_says_where_the_lead_is() -> None:
    def sums(no_hit: float, hit: float) -> dict[str, Any]:
        buckets = {"no hit": {"tokens": 60.0, "nats": no_hit}, "hit, 1–15 back": {"tokens": 40.0, "nats": hit}}
        return {"inside": buckets, "beyond": buckets}

    known = {"transformer": (100, 30), "mamba2": (100, 100), "jamba": (98, 40), "taipan": (100, 58)}
    results = kept({name: [sums(*own)] for name, own in known.items()})
    finding = found("copying", results)
    assert "by 0.620 nats a token; 97% of it is on tokens that repeat a bigram" in finding.because
    assert "keeps 68% of the lead" in finding.because
    assert finding.verdict == "holds"
    # where attention leads by little, as on prose after so few steps, no share of it is told
    small = {**known, "jamba": (100, 98), "taipan": (99, 60)}
    finding = found("copying", kept({name: [sums(*own)] for name, own in small.items()}))
    assert "is 0.020 nats a token, too little to keep a share of. Taipan leads by 0.410; 98% of" in finding.because
    assert finding.verdict == "holds"
    behind = {**small, "taipan": (105, 96)}
    assert found("copying", kept({name: [sums(*own)] for name, own in behind.items()})).verdict == "does not hold"


def test_shares_are_one_by_the_default_or_by_another_gate() -> None:
    def gate(rate: float) -> list[Any]:
        return [{"as trained": {"rate": rate}, "curve": [{"rate": 0.5}, {"rate": 0.15}]}]

    assert found("gap", kept({"paper": gate(0.3), "default": gate(0.16)})).verdict == "holds"
    assert found("gap", kept({"paper": gate(0.152), "default": gate(0.18)})).verdict == "holds in part"
    assert found("gap", kept({"paper": gate(0.3), "default": gate(0.18)})).verdict == "does not hold"


def test_recall_has_the_order_of_the_paper_or_not() -> None:
    def answers(share: float) -> list[dict[str, Any]]:
        hidden = [[kind, 512, 0.5, share] for kind in ("passkey", "pairs")]
        return [{"found": {"squad": share}, "hidden": hidden}]

    shares = {"transformer": 0.9, "taipan": 0.8, "jamba": 0.7, "mamba2": 0.1}
    results = {f"{name}, with tasks": answers(share) for name, share in shares.items()}
    assert found("recall", kept(results)).verdict == "holds"
    missing = found("recall", kept({**results, "jamba, with tasks": answers(0.85)}, **{"without a file": ["swde"]}))
    assert missing.verdict == "holds in part"
    assert "No file was given for swde." in missing.because
    assert len(figures(kept(results), "recall")) == 3


@pytest.mark.parametrize(
    ("strong", "quoted", "sliding", "verdict"),
    [(1.0, 0.95, 0.0, "holds"), (1.0, 0.2, 0.0, "holds in part"), (0.05, 0.0, 0.0, "does not hold")],
)
def test_a_window_that_keeps_what_is_strong(strong: float, quoted: float, sliding: float, verdict: Verdict) -> None:
    def answer(eviction: str, way: str, kind: str, length: int) -> dict[str, Any]:
        share = sliding if eviction == "oldest" else quoted if "quotes" in way else strong
        return {"eviction": eviction, "way": way, "kind": kind, "length": length, "found": share}

    answers = [
        answer(eviction, way.name, kind, length)
        for eviction in EVICTIONS
        for way in WAYS
        for kind in KINDS
        for length in (1024, 2**20)
    ]
    results = kept({"taipan": [{"answers": answers, "config": {"sliding_window": 128}}]})
    finding = found("retention", results)
    assert finding.verdict == verdict
    assert (
        f"asked for 1,048,576 tokens later, a window that keeps the strongest entries finds {strong:.0%}"
        in finding.because
    )
    ((picture, caption),) = figures(results, "retention")
    assert "<svg" in picture
    assert "128 slots" in caption


def test_the_default_is_best_or_within_what_seeds_differ_by() -> None:
    values = {"W = 256": 1.30, "W = 512": 1.20, "W = 1024": 1.25}
    assert found("window", kept(bits(**values))).verdict == "holds"
    assert found("window", kept(bits(**values | {"W = 256": 1.1}))).verdict == "does not hold"
    near = kept(bits(**values | {"W = 256": 1.19}))
    near.results["W = 1024"][0]["bits_per_byte"] = 1.3
    assert found("window", near).verdict == "holds in part"
    one = {best: found("window", kept(bits(**values | {"W = 256": best}), seeds=1)) for best in (1.196, 1.19)}
    assert [finding.verdict for finding in one.values()] == ["holds in part", "does not hold"]
    assert "one seed, nearer than 0.006 is equal" in one[1.19].because


def test_nothing_holds_by_one_seed_or_where_seeds_overlap() -> None:
    def ends(**bits_far: float) -> dict[str, Any]:
        points = {name: [{"start": 2048, "tokens": 10, "bits_per_byte": value}] for name, value in bits_far.items()}
        return {name: [{"bits_per_byte": 1.0, "by_position": own}] for name, own in points.items()}

    results = ends(without=1.2, RoPE=1.5)
    assert found("positions", kept(results)).verdict == "holds"
    alone = found("positions", kept(results, seeds=1))
    assert alone.verdict == "holds in part"
    assert alone.because.endswith("With 1 of 3 seeds.")
    assert found("positions", kept(ends(without=1.495, RoPE=1.5))).verdict == "holds in part"
    apart = kept(results)
    apart.results["without"][0]["by_position"] = [{"start": 2048, "tokens": 10, "bits_per_byte": 1.6}]
    assert found("positions", apart).verdict == "does not hold"


def test_every_experiment_has_a_claim() -> None:
    assert {claim.experiment for claim in CLAIMS} == {*ENTRIES, "associative-recall"}


def test_the_page_says_what_has_no_result(tmp_path: Path) -> None:
    done = run("reproduce", "report", str(RESULTS), "--out", str(tmp_path / "page"))
    assert done.code == 0, done.err
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    known = load(RESULTS)
    for claim in CLAIMS:
        if claim.experiment not in known:
            assert f"taipan reproduce {claim.experiment} makes one." in page
        else:
            assert f'<h2 id="{claim.experiment}">' in page
    assert page.count('class="verdict') == sum(max(1, len(known.get(claim.experiment, []))) for claim in CLAIMS)


def test_the_page_has_the_pages_of_selected_tokens(tmp_path: Path) -> None:
    (tmp_path / "results" / "selection").mkdir(parents=True)
    (tmp_path / "results" / "selection" / "a-novel.html").write_text("<p>novel</p>")
    written = write(tmp_path / "results", tmp_path / "page")
    assert [path.name for path in written] == ["index.html", "a-novel.html"]
    assert '<a href="selection/a-novel.html">a novel</a>' in written[0].read_text(encoding="utf-8")


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no directory"):
        load(tmp_path / "none")
    (tmp_path / "x.json").write_text(json.dumps({"experiment": "gap", "scale": "small"}))
    with pytest.raises(DataError, match=r"x\.json has no 'command'.*make it again"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("latency-by-length", ("taipan",)),
        ("positions", ("RoPE",)),
        ("ratio", ("one SAL, second", 0, "bits_per_byte")),
        ("gap", ("constant budget, no noise", 0, "as trained")),
        ("window", ("W = 128", 0, "machine", "cpu")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_results_that_lack_something_are_named(name: str, lacks: tuple[str | int, ...], tmp_path: Path) -> None:
    values = json.loads((RESULTS / f"{name}.json").read_text())
    *way, last = lacks
    held: Any = values["results"]
    for step in way:
        held = held[step]
    del held[last]
    (tmp_path / f"{name}.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"{name}\.json has no .*{last}.*make it again"):
        write(tmp_path, tmp_path / "page")


def test_full_attention_has_no_place_among_sizes_of_state() -> None:
    (results,) = load(RESULTS)["mqar"]
    ((picture, _),) = figures(results, "mqar")
    assert "Mamba-2, 16 KiB 0." in picture
    assert "attention" not in picture


def test_every_figure_has_the_four_in_one_colour() -> None:
    results = contexts(**dict.fromkeys(FOUR, (1.0, 2.0)))
    (first, _), *_ = figures(kept(results), "perplexity-by-context")
    assert all(f"var(--series-{number})" in first for number in range(1, 5))


def test_the_figure_of_the_readme_is_that_of_the_results(tmp_path: Path) -> None:
    curves = {name: {512: 1.2, 65536: 1.3, 1048576: 1.1} for name in FOUR}
    results = long(contexts(**dict.fromkeys(FOUR, (1.0, 2.0))), **curves)
    assert len(figures(kept(results), "perplexity-by-context")) == 4  # two texts, held-out documents, positions
    about = {"experiment": "perplexity-by-context", "scale": "small", "command": "x", "more": {}, "tables": []}
    own = kept(results).results
    (tmp_path / "p.json").write_text(json.dumps({**about, "text": "novels", "results": own}))
    written = write(tmp_path, tmp_path / "page")
    assert [path.name for path in written] == ["index.html", "loss-by-context.svg", "loss-by-context-narrow.svg"]
    for path in written[1:]:
        svg = path.read_text(encoding="utf-8")
        assert svg.startswith("<?xml")
        assert "Taipan 1.1" in svg


def test_failures_that_were_warned_of_and_those_that_were_none() -> None:
    def gate(bits: float, rate: float, *warnings: str) -> list[Any]:
        config = {"attention_capacity": 0.15}
        return [{"bits_per_byte": bits, "rate": rate, "config": config, "warnings": dict.fromkeys(warnings, 900)}]

    runs = {"nothing provoked": gate(1.4, 0.16), "open": gate(1.2, 0.99, "selects_all"), "hot": gate(1.41, 0.17)}
    good = found("failures", kept(runs))
    assert good.verdict == "holds"
    assert good.because.startswith("1 of 1 failures were warned of")
    assert "the model did not fail: hot" in good.because
    blind = found("failures", kept(runs | {"useless": gate(1.5, 0.15)}))
    assert blind.verdict == "holds in part"
    assert "Not: useless." in blind.because
    assert found("failures", kept({**runs, "open": gate(1.2, 0.99)})).verdict == "does not hold"
