"""Speed of a model on this machine, against its own linear layers, memory bandwidth, and other implementations.

Compared subjects run interleaved in one process and are compared repetition by repetition, so that other work on the
machine hits both.
"""

from taipan.benchmark.results import Comparison, Measurement, Spread
from taipan.benchmark.session import Session, run
from taipan.benchmark.settings import PEERS, SUITES, Settings

__all__ = ["PEERS", "SUITES", "Comparison", "Measurement", "Session", "Settings", "Spread", "run"]
