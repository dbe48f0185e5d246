"""From text to batches: tokenizer, corpus, token shards, sampling order, and the synthetic recall task."""
