"""One run at a time in a folder.

The lock is a POSIX record lock on a file in the folder: the kernel gives it back when the process ends, however it
ends, worker processes do not inherit it, and network file systems pass it to their server. Where there is none, the
process that the file names is looked for.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run folder, which is made if it is missing; one that was made and stayed empty is taken away again.

    Raises:
        ValueError: If another process holds it, or it cannot be written.
    """
    is_new = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(
            f"output_dir {run} cannot be written ({error.strerror}): choose another folder, or ask for the right to."
        ) from error
    try:
        holder = _take(descriptor, run / LOCK)
        if holder is not None:
            raise ValueError(
                f"output_dir {run} is in use by another training ({holder}): wait for its end or stop it, "
                "or choose another folder."
            )
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())
        try:
            yield
        finally:
            (run / LOCK).unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # not empty
                    run.rmdir()
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> str | None:
    """Take the lock, or tell who holds it."""
    if fcntl is None:
        return None
    pid, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").partition(" ")
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return f"process {pid} on {host}"
        return f"process {pid}" if host == socket.gethostname() and _is_alive(pid) else None
    # Its holder may have deleted the file between our opening and locking it.
    is_there = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
    return None if is_there else "which has just ended: start again"


def _is_alive(pid: str) -> bool:
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)  # no signal: asks whether it is there
    except ProcessLookupError:
        return False
    except OSError:  # there, and another user's
        return True
    return True
