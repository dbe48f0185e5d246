"""Errors for people: each message says what was given, what was expected and what to do."""


class TaipanError(Exception):
    """Base of every foreseeable failure of this package; the CLI prints it without a traceback."""


class ConfigError(TaipanError, ValueError):
    """A configuration or recipe value is unknown or impossible."""


class InputError(TaipanError, ValueError):
    """An argument of a call (tokens, masks, shapes, prompts) is not usable."""


class DataError(TaipanError, ValueError):
    """A file or data set is missing, empty, damaged or does not fit the model."""


class CheckpointError(TaipanError, ValueError):
    """A checkpoint is missing, truncated, corrupt or of another model."""


class StateError(TaipanError, ValueError):
    """A recurrent state does not belong to the model or batch it is used with."""


class TrainingError(TaipanError, RuntimeError):
    """Training cannot go on (for example: the loss is not finite)."""
