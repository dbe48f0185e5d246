"""Archives, unpacked by every Python that is promised."""

import tarfile
from pathlib import Path


def unpack(archive: tarfile.TarFile, directory: Path) -> None:
    """Unpack an archive of our own; Python before 3.11.4 (Debian's is 3.11.2) has no filters."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(directory, filter="data")
    else:
        archive.extractall(directory)
