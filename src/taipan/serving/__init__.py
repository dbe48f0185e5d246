"""An OpenAI-style server: many streams at once, prompts read between their tokens, prefixes read once."""
