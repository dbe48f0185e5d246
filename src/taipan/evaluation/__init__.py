"""Evaluation: prediction of text, recall, compression for comparison, and what the gates select."""

from taipan.evaluation.compression import Compression, compress
from taipan.evaluation.documents import Documents, PreparedDocuments, TextDocuments
from taipan.evaluation.gates import GateStatistics
from taipan.evaluation.mqar import MQARGate, MQARResult, evaluate_mqar
from taipan.evaluation.perplexity import EvaluationResult, PositionBucket, ReadTokens, evaluate, read_tokens
from taipan.evaluation.questions import Questions, read_questions
from taipan.evaluation.selection import LayerTrace, trace

__all__ = [
    "Compression",
    "Documents",
    "EvaluationResult",
    "GateStatistics",
    "LayerTrace",
    "MQARGate",
    "MQARResult",
    "PositionBucket",
    "PreparedDocuments",
    "Questions",
    "ReadTokens",
    "TextDocuments",
    "compress",
    "evaluate",
    "evaluate_mqar",
    "read_questions",
    "read_tokens",
    "trace",
]
