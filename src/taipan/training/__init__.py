"""Training: recipe, processes, step, watch, run; each room imports only from those before it."""
