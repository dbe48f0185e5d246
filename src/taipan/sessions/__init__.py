"""Sessions: what a model has read, kept on disk, to be asked, gone on with, forked and rolled back."""

from taipan.sessions.manifest import Manifest
from taipan.sessions.objects import ObjectStore
from taipan.sessions.readings import ReadingCache
from taipan.sessions.session import Answer, Session, SessionBusyError

__all__ = ["Answer", "Manifest", "ObjectStore", "ReadingCache", "Session", "SessionBusyError"]
