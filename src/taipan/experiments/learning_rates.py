"""The learning rate of every architecture: none is handicapped, and no best one is an edge of what was tried."""

from taipan.experiments.gate_settings import architectures, measure
from taipan.experiments.laboratory import LEARNING_RATE, Laboratory, Outcome, Table, Training
from taipan.experiments.sweep import MOST_ROUNDS, at_edge, best, rows, sweep

RATES = (LEARNING_RATE / 2, LEARNING_RATE, 2 * LEARNING_RATE)


def loss(result: dict[str, float]) -> float:
    """Held-out bits per byte."""
    return result["bits_per_byte"]


def learning_rates(lab: Laboratory) -> Outcome:
    """The first seed of every architecture at several rates; what the scale takes is compared with what was best."""
    configs = architectures(lab.scale)
    seed = lab.scale.seeds[0]

    def run(wanted: list[tuple[str, float]]) -> list[dict[str, float]]:
        trainings = [Training(name=name, config=configs[name], seed=seed, learning_rate=rate) for name, rate in wanted]
        return lab.measure(measure, trainings, lab.scale.context)

    tiny = lab.scale.name == "tiny"
    swept = sweep(list(configs), RATES[1:] if tiny else RATES, run, loss, rounds=0 if tiny else MOST_ROUNDS)
    header, lines = rows(swept, loss)
    taken = {name: lab.learning_rate(config) for name, config in configs.items()}
    lines = [[*line, f"{taken[line[0]]:g}"] for line in lines]
    results = {name: list(found.values()) for name, found in swept.items()}
    more = {
        name: {
            "rates": {f"{rate:g}": loss(result) for rate, result in found.items()},
            "best": best(found, loss),
            "edge": at_edge(found, loss),
            "taken": taken[name],
        }
        for name, found in swept.items()
    }
    title = "Bits per byte, held out, by learning rate, first seed"
    return Outcome(results, (Table(title, [*header, "all experiments take"], lines),), more)


EXPERIMENTS = {"learning-rates": learning_rates}
