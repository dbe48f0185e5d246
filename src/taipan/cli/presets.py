"""`taipan presets`: the named configurations and what they cost."""

from typing import Annotated

import typer


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("presets", rich_help_panel=panel)
    def presets(
        context: Annotated[int, typer.Option(min=1, help="Tokens of context the costs are computed for.")] = 4096,
    ) -> None:
        """List the named configurations with their parameters, FLOPs per token and state size.

        Example:

            taipan presets --context 16384
        """
        from taipan.accounting import flops_per_token, parameter_count, state_bytes
        from taipan.cli.console import print_table, quantity, size
        from taipan.config import TaipanConfig

        rows: list[list[str]] = []
        for name in TaipanConfig.presets():
            config = TaipanConfig.preset(name)
            rows.append(
                [
                    name,
                    _layers(config.layer_types),
                    str(config.hidden_size),
                    quantity(parameter_count(config)),
                    quantity(flops_per_token(config, context)),
                    size(state_bytes(config, context)),
                ]
            )
        columns = ["preset", "layers", "width", "parameters", "FLOPs/token", "state"]
        print_table(
            f"Forward FLOPs per token and fp32 state of one row at {context} tokens", columns, rows, text_columns=2
        )


def _layers(kinds: tuple[str, ...]) -> str:
    """ "18 mamba2 + 3 selective_attention" """
    return " + ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
