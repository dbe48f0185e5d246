"""Who holds what: a lock file that keeps a second process out, and says who was first."""

from taipan.locks.holder import Holder
from taipan.locks.lock import HeldError, held, holder_of

__all__ = ["HeldError", "Holder", "held", "holder_of"]
