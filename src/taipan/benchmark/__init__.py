"""How fast a model is here: against its own linear layers, the memory's bandwidth, and other implementations.

Whatever is compared runs in one process, interleaved, and is compared repetition by repetition, so that what else the
machine does hits both sides.
"""

from taipan.benchmark.report import Report, run
from taipan.benchmark.results import Comparison, Measurement, Spread
from taipan.benchmark.settings import PEERS, SUITES, Settings

__all__ = ["PEERS", "SUITES", "Comparison", "Measurement", "Report", "Settings", "Spread", "run"]
