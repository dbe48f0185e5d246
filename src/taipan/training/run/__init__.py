"""The life of a run: open it, take its steps, save and restore it, finish the model."""
