"""Training: recipes, optimizers, schedule, the loop, checkpoints, calibration of the gates."""
