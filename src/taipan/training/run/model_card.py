"""The README.md beside a finished model: metadata for tools, facts for people. Only what the run knows is said."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from taipan.accounting import flops_per_token, parameter_count, state_bytes
from taipan.config import TaipanConfig
from taipan.errors import how_to_install
from taipan.io import shareable
from taipan.training.recipe import Recipe
from taipan.training.run.calibration import Calibration
from taipan.training.watch.metrics import Record

FILE = "README.md"


def model_card(
    recipe: Recipe,
    config: TaipanConfig,
    record: dict[str, Any],
    final: Record,
    calibration: Sequence[Calibration],
    licences: Sequence[str],
) -> str:
    """Markdown with a YAML head, as the Hugging Face hub reads it.

    Args:
        recipe: of the run, as given.
        config: of the model.
        record: of the run, see `taipan.training.watch.record`.
        final: the last line of its metrics.
        calibration: what was set for each SAL.
        licences: what the data sets say about the licence of their texts.
    """
    name = Path(recipe.output).name
    kinds = config.layer_types
    layers = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    session = record["sessions"][-1]
    context = recipe.data.context_length
    training = recipe.training
    sources = recipe.data.train if isinstance(recipe.data.train, dict) else [recipe.data.train]
    held_out = None if recipe.data.valid is None else shareable(recipe.data.valid)
    rate = f"{recipe.optimizer.learning_rate:g}, {recipe.schedule.kind}"
    facts = [
        ("layers", layers),
        ("parameters", f"{parameter_count(config):,}"),
        ("width, vocabulary", f"{config.hidden_size}, {config.vocab_size:,}"),
        ("forward FLOPs per token", f"{flops_per_token(config, context):.3g} at {context:,} tokens"),
        ("state of one row", f"{state_bytes(config, context):,} bytes in float32 at {context:,} tokens"),
        ("started from", shareable(recipe.model.start) if recipe.model.start else "random weights"),
        ("steps, tokens", f"{final['step']:,}, {final['tokens']:,}"),
        ("tokens per step", f"{recipe.tokens_per_step:,} in windows of {context:,} ({recipe.data.packing})"),
        ("optimizer", f"{recipe.optimizer.name}, learning rate {rate}, clip {recipe.optimizer.clip}"),
        ("dtype, seed", f"{session['dtype']}, {training.seed}"),
        ("time", f"{final['seconds']:,.0f} s on {session['environment']['cpu']}, {session['processes']} process(es)"),
        ("data", ", ".join(map(shareable, sources))),
        ("data fingerprint", f"`{record['data']['fingerprint']}`"),
        ("run", f"`{record['id']}`, begun {record['created']}"),
        ("software", f"taipan {session['environment']['taipan']}, torch {session['environment']['torch']}"),
        *((f"commit of {key}", _commit(value)) for key, value in session["commit"].items()),
    ]
    head: dict[str, Any] = {
        "library_name": "taipan",
        "pipeline_tag": "text-generation",
        "tags": ["taipan", *_tags(kinds)],
    }
    parts = [f"# {name}", "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in facts)]
    if "valid_bits_per_byte" in final:
        bits, loss = final["valid_bits_per_byte"], final["valid_loss"]
        head["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "held-out text", "type": str(held_out)},
                        "metrics": [{"type": "bits_per_byte", "value": round(bits, 4)}],
                    }
                ],
            }
        ]
        parts.append(
            f"Held-out text (`{held_out}`): {bits:.4f} bits per byte, loss {loss:.4f} nats per token "
            f"(perplexity {math.exp(min(loss, 700.0)):.2f}) in windows of {context:,} tokens."
        )
    if calibration:
        rows = "\n".join(
            f"| {gate.layer} | {gate.threshold:.4f} | {100 * gate.rate_before:.1f} % | {100 * gate.rate:.1f} % |"
            for gate in calibration
        )
        parts.append(
            f"What the gates select at inference (budget {100 * config.attention_capacity:.1f} %), calibrated on "
            f"training text:\n\n| layer | threshold | before | after |\n|---|---|---|---|\n{rows}"
        )
    parts.append(
        '```python\nimport taipan\n\nmodel = taipan.load("DIRECTORY")\nprint(model.generate("The "))\n```\n\n'
        '```bash\ntaipan generate DIRECTORY "The "\n```\n\n'
        "With transformers: `import taipan.hf`, then its Auto classes load `DIRECTORY`. Programs that cannot import it "
        "are told to trust the directory (`trust_remote_code=True`, `--trust-remote-code`): its `modeling_taipan.py` "
        f"imports the package or says what to do: {how_to_install('hf')}."
    )
    notes = "\n".join(f"* {note}" for note in dict.fromkeys(licences))
    parts.append(f"The licence of the weights is for whoever publishes them to say. Of the data:\n\n{notes}")
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"


def _tags(kinds: Sequence[str]) -> list[str]:
    return [kind.replace("_", "-") for kind in dict.fromkeys(kinds)]


def _commit(value: dict[str, Any]) -> str:
    return f"`{value['commit']}`" + (" with uncommitted changes" if value["changed"] else "")
