"""Learning rates: each model at several, and more where the best one would be an edge."""

from collections.abc import Callable, Iterable, Sequence

from taipan.experiments.execution import Result

MOST_ROUNDS = 4
"""Times that a sweep is widened."""

Swept = dict[str, dict[float, Result]]
"""Per model, in order of the learning rate, what was found at each."""


def sweep(
    names: Sequence[str],
    rates: Sequence[float],
    run: Callable[[list[tuple[str, float]]], list[Result]],
    loss: Callable[[Result], float],
    *,
    rounds: int = MOST_ROUNDS,
) -> Swept:
    """Run every model at every rate; then, as long as a model's best rate is its highest or lowest, at the next one.

    Args:
        names: of the models.
        rates: ascending, in equal ratios.
        run: gives results of models at rates, in their order.
        loss: of a result; less is better.
        rounds: how often it is widened at most.
    """
    found: Swept = {name: {} for name in names}
    wanted = [(name, rate) for name in names for rate in rates]
    for _ in range(rounds + 1):
        for (name, rate), result in zip(wanted, run(wanted), strict=True):
            found[name][rate] = result
        wanted = [(name, rate) for name in names for rate in _beyond(found[name], loss)]
        if not wanted:
            break
    return {name: dict(sorted(results.items())) for name, results in found.items()}


def best(results: dict[float, Result], loss: Callable[[Result], float]) -> float:
    """The rate of least loss; of equal ones the one nearest to the middle."""
    rates = sorted(results)
    middle = (len(rates) - 1) / 2
    return min(rates, key=lambda rate: (loss(results[rate]), abs(rates.index(rate) - middle)))


def at_edge(results: dict[float, Result], loss: Callable[[Result], float]) -> bool:
    """Whether the best rate is the lowest or the highest."""
    return best(results, loss) in (min(results), max(results))


def rows(swept: Swept, loss: Callable[[Result], float], digits: int = 3) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table; the best of each model in bold, and whether it is an edge."""
    rates = sorted({rate for results in swept.values() for rate in results})
    lines: list[list[str]] = []
    for name, results in swept.items():
        chosen = best(results, loss)
        cells = [_cell(results, rate, chosen, loss, digits) for rate in rates]
        lines.append([name, *cells, f"{chosen:g}{', an edge' if at_edge(results, loss) else ''}"])
    return ["model", *(f"{rate:g}" for rate in rates), "best"], lines


def _cell(
    results: dict[float, Result], rate: float, chosen: float, loss: Callable[[Result], float], digits: int
) -> str:
    if rate not in results:
        return "–"
    text = f"{loss(results[rate]):.{digits}f}"
    return f"**{text}**" if rate == chosen else text


def _beyond(results: dict[float, Result], loss: Callable[[Result], float]) -> Iterable[float]:
    """The next rate on the side where the best one is the last."""
    rates = sorted(results)
    if len(rates) < 2:
        return
    ratio, chosen = rates[1] / rates[0], best(results, loss)
    if chosen == rates[0]:
        yield _rounded(rates[0] / ratio)
    elif chosen == rates[-1]:
        yield _rounded(rates[-1] * ratio)


def _rounded(rate: float) -> float:
    """Three digits: a rate is a name of a run as well."""
    return float(f"{rate:.3g}")
