"""Start stub dumps as processes of their own, quickly: a server that has imported everything forks one a request.

`Launcher` is the side of the tests; the file itself, run as a program, is the server. A request names the arguments,
and what shall go wrong below which folder. Every run is a real process, that can be killed by its number.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]
ASKING = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from tests.faults.injection import Fault, make_handler  # noqa: E402  (only now is it found)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run."""

    arguments: tuple[str, ...]
    """Of the stub command."""
    folder: Path
    """Below it operations are counted, fail, or are written down; stdout and stderr are kept beside it."""
    fault: Fault | None = None
    """What goes wrong."""
    log: Path | None = None
    """Where operations are appended to."""


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a run left behind."""

    code: int
    """Exit code; negative is the signal that ended it."""
    out: str
    err: str


class Launcher:
    """A context manager; inside, runs are started one at a time."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()

    def start(self, request: Request) -> int:
        """Start a run and return its process number, which is its own until `wait`, which must follow."""
        self._request = request
        return self._ask(b64encode(pickle.dumps(request)).decode())

    def wait(self) -> Left:
        """Wait for the run that was started."""
        code = self._ask("wait")
        out, err = (path.read_text("utf-8") for path in _outputs(self._request.folder))
        return Left(code=code, out=out, err=err)

    def run(self, request: Request) -> Left:
        """Start a run and wait for it."""
        self.start(request)
        return self.wait()

    def _ask(self, line: str) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(f"{line}\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server of the fault matrix has died"
        return int(answer)


def _outputs(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f"{folder.name}.out"), folder.with_name(f"{folder.name}.err")


def _serve() -> None:
    import tests.faults.workload  # noqa: F401  (so that no run has to)

    assert "torch" not in sys.modules
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    while line := sys.stdin.readline():
        process = os.fork()
        if process == 0:
            _become(pickle.loads(b64decode(line)))
        print(process, flush=True)
        sys.stdin.readline()  # until the client waits for it, the process keeps its number, alive or not
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _become(request: Request) -> None:
    from mmextract.engine import direct
    from tests.faults import workload
    from tests.faults.interposer import interpose

    direct.FEWEST_BYTES = direct.BLOCK_BYTES  # so that these shards are written as large ones are
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in zip((1, 2), _outputs(request.folder), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    log = request.log.open("ab") if request.log else None

    def promise(shard: int) -> None:
        if log is not None:
            pickle.dump(shard, log)
            log.flush()

    if request.fault is not None or log is not None:
        interpose(request.folder, make_handler(request.fault, log))
    workload.add_command(promise)
    code: object = 1
    try:
        _listen()
        workload.run(request.arguments)
    except SystemExit as left:
        code = left.code
    except KeyboardInterrupt:  # before the command listens, as the interpreter would leave
        code = INTERRUPTED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _listen() -> None:
    """Let signals come that were held back until the run begins, as if they came in its first moment."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    _serve()
