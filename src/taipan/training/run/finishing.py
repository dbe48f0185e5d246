"""The end of a run: gates calibrated, the finished model evaluated and written with its card."""

import math
from dataclasses import asdict
from pathlib import Path

from taipan.io import atomic_write
from taipan.model import weights_of
from taipan.training.run.calibration import Calibration, calibrate
from taipan.training.run.model_card import FILE as MODEL_CARD
from taipan.training.run.model_card import model_card
from taipan.training.run.opening import MODEL, OpenRun, feed_of
from taipan.training.run.session import Session
from taipan.training.watch.listener import TrainingListener
from taipan.training.watch.metrics import Record
from taipan.training.watch.validation import validate

_CALIBRATION_TOKENS = 65_536


def held_out_loss(run: OpenRun, listener: TrainingListener) -> Record:
    """Fields of a metrics line from the held-out data; none if there are no held-out data."""
    if run.held_out is None:
        return {}
    listener.phase("evaluating")
    batches = run.held_out.first(run.recipe.training.evaluate_batches)
    outcome = validate(run.model, batches, run.held_out.bytes_per_token, dtype=run.dtype.dtype, world=run.world)
    run.parallel.settle()
    closed: Record = {} if outcome.loss_closed is None else {"valid_loss_closed": outcome.loss_closed}
    return {
        "valid_loss": outcome.loss,
        **closed,
        "valid_bits_per_byte": outcome.bits_per_byte,
        "valid_gates": [asdict(gate) for gate in outcome.gates],
    }


def calibrated(run: OpenRun, listener: TrainingListener) -> tuple[Calibration, ...]:
    """Set the gates' thresholds so that they select their budget of training text, if the recipe wants it."""
    run.model.set_progress(1.0)
    if not (run.recipe.training.calibrate and run.model.sals):
        return ()
    listener.phase("calibrating the gates")
    # every process reads all parts: the same thresholds everywhere, without an exchange
    count = math.ceil(_CALIBRATION_TOKENS / run.recipe.tokens_per_forward)
    parts = [feed_of(run.recipe, run.data, run.world, (number, run.world.size)) for number in range(run.world.size)]
    batches = [batch for part in parts for batch in part.first(count)]
    calibration = tuple(calibrate(run.model, batches, dtype=run.dtype.dtype))
    run.parallel.settle()
    return calibration


def write_model(run: OpenRun, session: Session, final: Record, calibration: tuple[Calibration, ...]) -> Path:
    """Write the finished model and its card; returns the directory."""
    directory = run.path / MODEL
    weights = weights_of(run.model)
    with run.world.together():
        if run.world.leads:
            run.model.save_pretrained(directory, run.tokenizer, weights=weights)
            licences = [manifest.licence for manifest in run.data.manifests]
            card = model_card(run.recipe, run.model.config, session.record, final, calibration, licences)
            atomic_write(directory / MODEL_CARD, card.encode())
    session.listener.saved(directory)
    return directory
