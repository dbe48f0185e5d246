"""The modules of the decoder."""
