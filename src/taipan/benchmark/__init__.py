"""How fast a model is here: against its own linear layers, the memory's bandwidth, and other implementations.

Whatever is compared runs in one process, interleaved, and is compared repetition by repetition, so that what else the
machine does hits both sides.
"""

from taipan.benchmark.results import Comparison, Measurement, Spread
from taipan.benchmark.session import Session, run
from taipan.benchmark.settings import PEERS, SUITES, Settings

__all__ = ["PEERS", "SUITES", "Comparison", "Measurement", "Session", "Settings", "Spread", "run"]
