from taipan import TaipanConfig
from taipan.accounting import parameter_count
from tests.cli.conftest import Cli


def test_lists_every_preset(cli: Cli) -> None:
    out = cli("presets").out
    assert all(name in out for name in TaipanConfig.presets())


def test_costs_follow_the_context(cli: Cli) -> None:
    def line(context: int) -> str:
        lines = cli("presets", "--context", context).out.splitlines()
        return next(line for line in lines if " transformer-190m " in line)

    assert line(64) != line(4096)
    assert f"{parameter_count(TaipanConfig.preset('transformer-190m')) / 1e6:.3g} M" in line(64)
