"""Programs in processes forked from one that has imported what most of them need: for tests that want what a job does, and not how its process starts.

`python warm.py SOCKET` is that process. Whoever starts a program starts `client` as its Python: a process that hands over its words, environment, streams and
signals, and ends as the program does. It knows `-m module …`, `-c code …` and `script.py …`.
"""
import array
import atexit
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
from pathlib import Path
from types import ModuleType

PRELOADED = [
    "typer.testing", "rich.table", "torch.distributed.fsdp", "torch.distributed.distributed_c10d", "scipy.stats", "scipy.optimize", "sklearn.ensemble", "matplotlib.pyplot", "holoviews.plotting.mpl", "xarray",
    "h5netcdf", "papermill", "IPython.core.interactiveshell", "jupyter_client.provisioning", "turbvit_nb.lab.jobs", "turbvit_nb.lab.plots",
    "turbvit_nb.datasets", "turbvit_nb.train", "turbvit_nb.inference",
]
OWNERS = ("TURBVIT_PARENT", "JPY_PARENT_PID")  # variables that name the parent of a process

CLIENT = """#!{python} -IS
import array, json, os, signal, socket, struct, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = json.dumps({{"words": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}).encode()
server.sendmsg([struct.pack("I", len(asked))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(asked)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
code, = struct.unpack("i", server.recv(4) or struct.pack("i", 1))
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def _program(words: list[str]) -> None:
    "What Python does with these words."
    words = [word for word in words if word != "-u"]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.modules["__main__"] = ["-c", *words[2:]], (main := ModuleType("__main__"))
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).absolute().parent)
        runpy.run_path(words[0], run_name="__main__")


def _live(asked: dict, streams: list[int]) -> int:  # exit code
    "The life of a program, in the forked process, to an end like that of any other."
    atexit._clear()
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
    environment = asked["environment"] | {name: str(os.getppid()) for name in OWNERS if asked["environment"].get(name)}
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(asked["folder"])
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)
    code = 0
    try:
        _program(asked["words"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        print(leaving.code, file=sys.stderr) if isinstance(leaving.code, str) else None
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def _asked(friend: socket.socket) -> tuple[dict, list[int]]:
    "What a client says, and its streams."
    head, parts, *_ = friend.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    streams, size, said = array.array("i"), struct.unpack("I", head)[0], b""
    streams.frombytes(parts[0][2])
    while len(said) < size:
        said += friend.recv(size - len(said))
    return json.loads(said), list(streams)


class Server:
    "Forks for whoever asks, until its standard input ends."

    def __init__(self, address: str):
        self.door, self.selector = socket.socket(socket.AF_UNIX), selectors.DefaultSelector()
        self.door.bind(address)
        self.door.listen(64)
        self.selector.register(self.door, selectors.EVENT_READ, self.meet)
        self.selector.register(sys.stdin, selectors.EVENT_READ, lambda *_: sys.exit())

    def meet(self, door: socket.socket) -> None:
        "A client has come: its program begins."
        friend, _ = door.accept()
        asked, streams = _asked(friend)
        if not (process := os.fork()):
            code = 1
            try:
                self.selector.close()
                door.close()
                friend.close()
                code = _live(asked, streams)
            finally:
                os._exit(code)
        for stream in streams:
            os.close(stream)
        ended = os.pidfd_open(process)
        self.selector.register(friend, selectors.EVENT_READ, lambda _: self.hear(friend, process))
        self.selector.register(ended, selectors.EVENT_READ, lambda _: self.tell(friend, ended, process))

    def hear(self, friend: socket.socket, process: int) -> None:
        "A client passes signals on, or is gone and takes its program with it."
        numbers = friend.recv(16)
        for number in numbers or [signal.SIGKILL]:
            os.kill(process, number)
        if not numbers:
            self.selector.unregister(friend)

    def tell(self, friend: socket.socket, ended: int, process: int) -> None:
        "A program has ended: its client is to end alike."
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        self.selector.unregister(ended)
        os.close(ended)
        if friend in self.selector.get_map():
            self.selector.unregister(friend)
            friend.sendall(struct.pack("i", code))
        friend.close()

    def serve(self) -> None:
        "For ever."
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == self.door or key.fd in self.selector.get_map():
                    key.data(key.fileobj)


def client(folder: Path, python: str) -> Path:
    "Write the program that stands for Python; its server is asked at `socket` in the folder."
    program = folder / "python"
    program.write_text(CLIENT.format(python=python, address=str(folder / "socket")))
    program.chmod(0o755)
    return program


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    multiprocessing.set_executable(sys.executable)  # of the processes of `multiprocessing`, which get more than three streams
    sys.executable = str(client(folder, sys.executable))  # of the programs that a program starts
    sys.path[0] = ""
    for name in PRELOADED:
        importlib.import_module(name)
    server = Server(str(folder / "socket"))
    print("ready", flush=True)
    server.serve()
