"""Conversations: turns as tokens, by a model's chat template or as plain text, and what was said so far as states."""

from taipan.chat.conversation import Conversation
from taipan.chat.format import ChatFormat, PlainFormat, Turn
from taipan.chat.template import TemplateFormat, load_format

__all__ = ["ChatFormat", "Conversation", "PlainFormat", "TemplateFormat", "Turn", "load_format"]
