"""One file per suite, each with a `measure`."""
