"""Finds the code of this model, which is in the package taipan-lm."""

try:
    from taipan.hf import TaipanForCausalLM, TaipanForSequenceClassification, TaipanHFConfig, TaipanModel
except ImportError as error:
    raise ImportError(
        "This is a Taipan model, whose code is in the package taipan-lm, extra hf: pip install '.[hf]' in your clone of Taipan ("
        + str(error)
        + ")."
    ) from error

__all__ = ["TaipanForCausalLM", "TaipanForSequenceClassification", "TaipanHFConfig", "TaipanModel"]
