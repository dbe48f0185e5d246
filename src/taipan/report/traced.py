"""From a model and a text to the coloured text."""

from taipan.data.tokenizer import StreamDecoder, Tokenizer
from taipan.errors import ConfigError
from taipan.evaluation import trace
from taipan.model import TaipanLM
from taipan.report.selection import LayerSelection, SelectionView, selection_view


def traced_view(model: TaipanLM, tokenizer: Tokenizer, text: str) -> SelectionView:
    """Read a text as at inference and show what every gate decided.

    Args:
        model: with at least one selective attention layer.
        tokenizer: the model's.
        text: at least one character; memory beyond the tokens themselves does not depend on its length.

    Raises:
        ConfigError: the model has no selective attention layer.
        InputError: the text is empty.
    """
    if not model.sals:
        raise ConfigError("The model has no selective attention layer: there is no selection to show.")
    ids = tokenizer.encode(text)
    layers = [
        LayerSelection(
            layer=layer.layer,
            selected_T=layer.selected_T.numpy(),
            margin_T=layer.margin_T.numpy(),
            capacity=model.config.attention_capacity,
            threshold=layer.threshold,
        )
        for layer in trace(model, ids)
    ]
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(index) for index in ids]
    pieces[-1] += decoder.flush()
    return selection_view(pieces, layers, vocabulary=tokenizer.vocab_size)
