"""One run directory, one process: a second one is refused, with a message that names the first."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from taipan import locks
from taipan.errors import CheckpointError, ConfigError

LOCK = "run.lock"


@contextmanager
def held(run: Path, warn: Callable[[str], None]) -> Generator[None]:
    """Hold a run directory, made if it is missing, while the context lasts.

    Args:
        run: the run directory.
        warn: is told if the file system cannot keep a second process out.

    Raises:
        ConfigError: another process holds it, or may hold it and cannot be seen from here; or it is a file.
        CheckpointError: the directory cannot be written.
    """
    path = run / LOCK
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run} is a file, but a run needs a directory of its own: name another output.")
    with ExitStack() as stack:
        try:
            made = not run.exists()
            run.mkdir(parents=True, exist_ok=True)
            if made:
                stack.callback(_remove_empty, run)  # a refused recipe leaves nothing
            stack.enter_context(locks.held(path, warn))
        except locks.HeldError as error:
            if not error.seen:
                raise ConfigError(str(error)) from error
            raise ConfigError(
                f"{run} is held by {error.who}: two runs in one directory would write over each other. Wait "
                "until it has ended, stop it (it saves on SIGTERM), or name another output."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written ({error.strerror}): check the permissions and that {run} is a directory, or "
                "name another output."
            ) from error
        yield


def _remove_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()
