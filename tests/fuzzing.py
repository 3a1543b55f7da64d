"""Damage for files, and a child process that reads them: what a reader makes of each, or how it fails."""
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from turbvit_nb.lab.config import LabError
from turbvit_nb.physics.py2d import StoreError

SEED = int(os.environ.get("TURBVIT_FUZZ_SEED", 0))
EDGES = [bytes(n) for n in (1, 4, 8)] + [b"\xff" * n for n in (1, 4, 8)] + [n.to_bytes(8, "little") for n in (1 << 31, 1 << 40, 1 << 62)]
TEXTS = [b"[", b"{", b'"', b"\n", b"\0", b",", b"-", b"1e999", b"9" * 30, b"null", b"[[[[", b"\xff\xfe", b"../", b"\\u0000", b"NaN"]


def damaged(data: bytes, draw: random.Random) -> bytes:
    "The bytes with one to three of them flipped, some inserted, deleted, repeated or set to an extreme, or with the end cut off."
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        at = draw.randrange(len(data) + 1) if draw.random() < 0.5 else min(draw.randrange(1024), len(data))
        length = draw.choice([1, 1, 4, 8, 64, 512])
        kind = draw.randrange(7)
        if kind < 2 and at < len(data):
            data[at] ^= 1 << draw.randrange(8) if kind else draw.randrange(1, 256)
        elif kind == 2:
            data[at:at] = draw.choice(TEXTS) if draw.random() < 0.5 else draw.randbytes(length)
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data[at : at + length] = data[at : at + length] * 2
        else:
            edge = draw.choice(EDGES)
            data[at : at + len(edge)] = edge
    return bytes(data)


def damages(data: bytes, count: int, seed: object = SEED) -> Iterator[bytes]:
    "So many damaged copies; the first is cut to nothing, the second to its half."
    draw = random.Random(f"{SEED} {seed}")
    yield from (b"", data[: len(data) // 2])
    yield from (damaged(data, draw) for _ in range(count - 2))


def one_line(error: Exception, *names: str) -> str:
    "Empty where an error is the lab's one line and says one of the names; else what is wrong with it."
    if not isinstance(error, (LabError, StoreError)):
        return "".join(traceback.format_exception(error))
    if "\n" in str(error):
        return f"more than one line: {error!r}"
    return "" if any(name in str(error) for name in names) else f"does not name {names[0]}: {error!r}"


def judged(read: Callable[[], object], *names: str) -> str:
    "Empty where `read` returns something or fails in one line that says one of the names; else what is wrong."
    try:
        read()
    except Exception as error:
        return one_line(error, *names)
    return ""


def _watched(task: Callable[[int], str], numbers: Sequence[int], tell: int, room: int, seconds: int) -> None:
    "The life of the child: tasks in turn, with bounded memory, and with a bounded time for each."
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in numbers:
        os.write(tell, f"{number} ".encode())
        signal.alarm(seconds)
        wrong = task(number)
        signal.alarm(0)
        os.write(tell, repr(wrong).encode() + b"\n")


def in_child(
    task: Callable[[int], str],  # says what is wrong, empty where nothing is
    count: int,  # of its calls, numbered from 0
    room: int = 1 << 30,  # bytes that they may ask for, on top of what there is
    seconds: int = 20,  # for each
) -> dict[int, str]:  # number: what is wrong
    "Call `task` in child processes. One that is killed, by whatever, is wrong, and the next goes on with the rest."
    faults, left = {}, list(range(count))
    while left:
        hear, tell = os.pipe()
        sys.stdout.flush(), sys.stderr.flush()
        if not (child := os.fork()):
            os.close(hear)
            code = 1
            try:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1), os.dup2(nowhere, 2)
                _watched(task, left, tell, room, seconds)
                code = 0
            finally:
                os._exit(code)
        os.close(tell)
        with os.fdopen(hear, "rb") as told:
            lines = told.read().decode().splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for line in lines:
            number, _, wrong = line.partition(" ")
            left.remove(int(number))
            if not wrong:
                faults[int(number)] = f"the process ended with {status}" if status != -signal.SIGALRM else f"took more than {seconds} s"
            elif wrong != "''":
                faults[int(number)] = eval(wrong)  # of `repr`, our own
        if not lines:
            raise RuntimeError(f"the child did nothing and ended with {status}")
    return faults


def hashes(folder: Path) -> dict[str, str]:
    "The content of every file of a folder, links included."
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


class Canary:
    "What unpickles to a file that must not appear."

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)
