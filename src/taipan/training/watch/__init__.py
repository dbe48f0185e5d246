"""Who watches a run, and what is kept of it: listeners, trackers, metrics, samples, held-out loss, the record."""
