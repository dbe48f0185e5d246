"""`taipan …` and Python code out of a process that has imported everything already: each is forked from it.

A Python that imports torch takes two seconds to start, and documents start many. What is forked has the words, the
directory, the environment and the standard streams of its caller, who gets its exit code. It ends with its caller.
"""

import ast
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STREAMS = [0, 1, 2]
# It imports nothing but the standard library, so that it starts at once.
CALLER = """#!{python} -IS
import os, socket, sys
with socket.socket(socket.AF_UNIX) as warm:
    warm.connect({place!r})
    call = repr((sys.argv, os.getcwd(), dict(os.environ))).encode()
    socket.send_fds(warm, [len(call).to_bytes(8, "big")], [0, 1, 2])
    warm.sendall(call)
    code = warm.recv(1)
sys.exit(code[0] if code else "it was killed")
"""


@contextmanager
def warm_programs() -> Iterator[Path]:
    """A directory for the PATH, with programs that start at once while the context lasts.

    They are `taipan`, and `python-code`, which runs what it is given on standard input.
    """
    with tempfile.TemporaryDirectory(prefix="warm-") as directory, socket.socket(socket.AF_UNIX) as listening:
        place, programs = Path(directory, "socket"), Path(directory, "bin")
        programs.mkdir()
        for name in ("taipan", "python-code"):
            program = programs / name
            program.write_text(CALLER.format(python=sys.executable, place=str(place)), encoding="utf-8")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        listening.bind(str(place))
        listening.listen()
        command = [sys.executable, __file__, str(listening.fileno())]
        process = subprocess.Popen(command, pass_fds=[listening.fileno()])
        try:
            yield programs
        finally:
            process.kill()
            process.wait()


def serve(listening: socket.socket) -> None:
    """Fork for every caller."""
    import taipan.cli.main
    import taipan.evaluation
    import taipan.report.traced
    import taipan.sessions
    import taipan.training.run.loop  # noqa: F401

    sys.path[0] = ""  # the directory of who calls
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        caller, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            caller.sendall(bytes([answered(caller)]))
            os._exit(0)
        caller.close()


def answered(caller: socket.socket) -> int:
    """Do what the caller asks for; the exit code."""
    head, streams, _, _ = socket.recv_fds(caller, 8, len(STREAMS))
    call = caller.makefile("rb").read(int.from_bytes(head, "big"))
    sys.argv, directory, environment = ast.literal_eval(call.decode())
    for stream, own in zip(streams, STREAMS, strict=True):
        os.dup2(stream, own)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    threading.Thread(target=follow, args=(caller,), daemon=True).start()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if Path(sys.argv[0]).name == "python-code":
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
        else:
            from taipan.cli.main import main

            main()
    except SystemExit as end:
        if not isinstance(end.code, str):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def follow(caller: socket.socket) -> None:
    """End with the caller, whom a signal may have ended."""
    caller.recv(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
