"""Jobs that die: every stage in a process of its own, forked from one that has imported everything, ended by SIGKILL at a moment or at a system call.

The server below is that process: a line of JSON asks for a life of a stage, a line answers how it ended.
"""
import atexit
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

import h5py
import numpy as np
import torch
import xarray as xr

from turbvit_nb.lab import learner, runs
from turbvit_nb.lab.config import find_config, in_one_line, is_users
from turbvit_nb.lab.files import atomic, read_checkpoint
from turbvit_nb.lab.runs import history, open_run, stages
from turbvit_nb.lab.sweeping import Sweeping, choose
from turbvit_nb.lab.sweeps import Task, read_sweep

STRACE = shutil.which("strace")
WRITES = "write,pwrite64,writev,rename,renameat2,fsync,fdatasync,ftruncate,unlink,mkdir,fallocate"
WORK = {  # what the section Run of a chapter does before it shows anything
    "train": ["train:train"], "prune": ["prune:prune"], "distil": ["distil:distil"], "inference": ["inference:infer"],
    "short_analysis": ["short_analysis:short_analysis"], "long_analysis": ["long_analysis:long_analysis"], "compare": ["compare:compare"],
    "deploy": ["deploy:deploy_run"], "flow": ["flow.job:train_flow"], "images": ["images:train_images"], "sparse": ["sparse.job:train_sparsely"],
    "latent": ["latent.job:train_latent", "latent.job:keep_latents"], "arrays": ["arrays:train_surrogate", "arrays:keep_codes"],
    "condition": ["condition:train_condition"], "classes": ["classes:train_classes"],
}


@dataclass(frozen=True)
class Stage:
    "A stage of a smoke config, its run, and the stages that the run `r` has been through before."

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    run_name: str = "r"

    @property
    def folders(self) -> list[str]:
        "Of its runs."
        return [self.run_name]

    def open(self):
        "As the user would: the run folder where the stage has been begun there, else the config."
        folder = Path(os.environ["TURBVIT_RUNS"]) / self.run_name
        begun = (folder / "config.toml").exists() and self.name in stages(folder)
        given = (f"output_dir={self.run_name}", *self.overrides)
        return open_run(folder, self.name) if begun else open_run(find_config(self.config), self.name, given)

    def run(self) -> None:
        "Do it, or go on with it."
        run = self.open()
        for where in WORK[self.name]:
            module, name = where.split(":")
            getattr(importlib.import_module(f"turbvit_nb.{module}"), name)(run)
        run.finish()


STUDY = """[sweep]
name = "study"
base = "configs/smoke/train.toml"
run = "study/{seed}"
chapters = ["02_train"]
jobs = 2
grid = { seed = [0, 1] }
"""
POINT = """import os, sys, threading, torch
from turbvit_nb.lab.jobs import PARENT, outlive
threading.Thread(target=outlive, args=(int(os.environ[PARENT]), threading.Event()), daemon=True).start()  # as turbvit run does
from turbvit_nb.lab.runs import open_run
run = open_run(sys.argv[1], "train", sys.argv[2:])
run.save("best", {"seed": run.config.top.seed, "w": torch.ones(3)})
run.finish()"""


class Study:
    "A sweep: two runs side by side, whose jobs leave a model and are done."

    before, folders = (), ["study/0", "study/1"]

    def run(self) -> None:
        "Do it, or go on with it."
        file = Path(os.environ["TURBVIT_DATA"]).with_name("study.toml")
        with atomic(file) as part:
            part.write_text(STUDY)
        sweep = read_sweep(file)
        for _ in Sweeping(sweep, 2, choose(sweep), self.command):
            pass

    def command(self, task: Task) -> list[str]:
        "The job of a run, which goes on where it has begun."
        begun = "train" in history(task.point.folder)
        return [sys.executable, "-c", POINT, *([str(task.point.folder)] if begun else [str(task.point.base), *task.point.overrides])]


SMALL = ("training.epochs=2", "training.rollout_steps=5", "training.rollout_starts=2")
ANALYSED = (*SMALL, "finetuning.rollout_steps=5", "finetuning.rollout_starts=2", "finetuning.precision=fp32", "training.precision=fp32", "inference.chunk_size=7",
            "analysis.max_leadtime=10", "analysis.n_ensembles=4", "compare.leads=[5, 10]")
COMPARE = "configs/smoke/compare.toml"
STAGES = {stage.name: stage for stage in (
    Stage("train", COMPARE, ANALYSED),
    Stage("prune", COMPARE, ANALYSED, ("train",)),
    Stage("inference", COMPARE, ANALYSED, ("train", "prune")),
    Stage("short_analysis", COMPARE, ANALYSED, ("train", "prune")),
    Stage("long_analysis", COMPARE, ANALYSED, ("train", "prune", "inference")),
    Stage("compare", COMPARE, ANALYSED, ("train", "prune", "inference", "short_analysis", "long_analysis")),
    Stage("distil", "configs/smoke/distil.toml", ("finetuning.epochs=2", "finetuning.rollout_steps=5", "finetuning.rollout_starts=2",
                                                  "distillation.teacher_checkpoint='r/checkpoints/best.tar'"), ("train",), "student"),
    Stage("flow", "configs/smoke/flow.toml", ("flow.epochs=2", "flow.rollout_starts=2", "flow.rollout_members=2")),
    Stage("sparse", "configs/smoke/sparse.toml", ("training.epochs=3", "training.rollout_steps=5", "training.rollout_starts=2")),
    Stage("latent", "configs/smoke/latent.toml", ("latent.epochs=2", "latent.samples=16")),
    Stage("arrays", "configs/smoke/surrogate.toml", ("surrogate.epochs=4", "surrogate.validate_every=2")),
    Stage("condition", "configs/smoke/condition.toml", ("condition.epochs=4", "condition.validate_every=2")),
    Stage("classes", "configs/smoke/classes.toml", ("classes.epochs=2", "classes.count=200")),
    Stage("images", "configs/smoke/images.toml", ("flow.epochs=2", "images.count=200")),
    Stage("deploy", COMPARE, (*ANALYSED, "deploy.backends=['torch', 'onnxruntime']", "deploy.check_frames=8", "deploy.rollout_steps=5", "deploy.repeats=3"), ("train",)),
)} | {"sweep": Study()}


def generate_data() -> None:
    "The data of the smoke configs, as a job of its own."
    from turbvit_nb.data.generate import GenerateConfig, generate
    from turbvit_nb.lab.config import load_config

    generate(load_config(find_config(COMPARE)).section("generate", GenerateConfig))


# ---------------------------------------------------------------------------------------------------------------------- the server
def _live(name: str, words: socket.socket) -> int:  # exit code
    "The life of a job, in the forked process: the end is that of a program of its own."
    atexit._clear()
    runs._watching = False
    code = 0
    try:
        generate_data() if name == "generate" else STAGES[name].run()
    except BaseException as error:
        code = 1
        words.send(f"{'user' if is_users(error) else 'ours'}: {type(error).__name__}: {in_one_line(error)}".encode()[:60_000])
        for run in list(runs._open.values()):
            run.interrupted(error)
    atexit._run_exitfuncs()
    return code


def _fork(name: str, words: socket.socket) -> tuple[int, int]:  # process; what opens the gate
    "A process that waits at a gate and then does the job."
    gate, opener = os.pipe()
    if process := os.fork():
        os.close(gate)
        return process, opener
    code = 2
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        os.close(opener)
        os.read(gate, 1)
        code = _live(name, words)
    finally:
        os._exit(code)


def _traced(process: int, log: str, inject: list[str], whole: bool) -> subprocess.Popen:
    "strace on a process, from now on; on the whole of it: its threads, and what it starts."
    rules = [word for rule in inject for word in ("-e", f"inject={rule}")]
    tracer = subprocess.Popen([STRACE, *(["-f"] if whole else []), "-q", "-o", log, "-e", f"trace={WRITES}", *rules, "-p", str(process)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while "TracerPid:\t0" in Path(f"/proc/{process}/status").read_text() and tracer.poll() is None:
        time.sleep(0.005)
    return tracer


def life(
    name: str,  # of a stage, or "generate"
    after: float | None = None,  # SIGKILL after so many seconds
    kill: dict[str, int] = {},  # SIGKILL at the so-manieth system call of a name
    full: dict[str, int] = {},  # from the so-manieth system call of a name on, the disk is full
    count: bool = False,  # say which calls there were
) -> dict:  # code (negative: of a signal), words, seconds, calls
    "Let a job live once."
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    inject = [f"{call}:signal=KILL:when={n}" for call, n in kill.items()] + [f"{call}:error=ENOSPC:when={n}+" for call, n in full.items()]
    with TemporaryDirectory() as folder:
        process, opener = _fork(name, theirs)
        tracer = _traced(process, f"{folder}/calls", inject, name != "sweep") if inject or count else None
        begin, clock = time.monotonic(), Timer(after or 300, os.kill, (process, signal.SIGKILL))
        clock.start()
        os.close(opener)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        clock.cancel()
        seconds = time.monotonic() - begin
        if tracer:
            tracer.wait()
        lines = [line.split() if name != "sweep" else [str(process), *line.split()] for line in Path(f"{folder}/calls").read_text().splitlines()] if count else []
    try:
        words = ours.recv(65_536).decode()
    except BlockingIOError:
        words = ""
    calls = [line[1].split("(")[0] for line in lines if line[0] == str(process) and "(" in line[1]]
    return {"code": code, "words": words, "seconds": seconds, "calls": calls}


def serve() -> None:
    "Answer orders until there are no more."
    os.environ["TURBVIT_PROGRESS"] = "0"
    torch.set_num_threads(1)
    learner.Checkpoint.__init__.__kwdefaults__ = None
    learner.Checkpoint.__init__.__defaults__ = tuple(0.0 if value == 10.0 else value for value in learner.Checkpoint.__init__.__defaults__)
    for where in (place for works in WORK.values() for place in works):
        importlib.import_module(f"turbvit_nb.{where.split(':')[0]}")
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        os.environ |= order.pop("environment")
        print(json.dumps(life(**order)), flush=True)


class Server:
    "The server as its client sees it."

    def __init__(self):
        path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | path)
        assert self.process.stdout.readline() == "ready\n"

    def life(self, name: str, home: Path, data: Path, **how) -> dict:
        "One life of a stage whose runs are in `home`."
        order = {"name": name, "environment": {"TURBVIT_RUNS": str(home), "TURBVIT_DATA": str(data)}} | how
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@contextmanager
def server() -> Iterator[Server]:
    "A server, and its end."
    serving = Server()
    try:
        yield serving
    finally:
        serving.process.stdin.close()
        serving.process.wait(30)


# ---------------------------------------------------------------------------------------------------------------------- what is left
TIMES = {"seconds", "joules", "started", "ended", "changed", "opened", "process", "wrote", "begun", "run_id", "id"}  # wrote: of status.json, that it was killed after the first


def _of_a_clock(key: str) -> bool:
    "Whether a value of this name is another one every time."
    return key in TIMES or key.endswith("_seconds") or key.split(" ")[0] in ("ms", "speed-up", "ratio")


def _timeless(value: object) -> object:
    "Plain values without those that a clock says, arrays in place of tensors."
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not _of_a_clock(str(key))}
    return [_timeless(item) for item in value] if isinstance(value, (list, tuple)) else value


def _netcdf(path: Path) -> dict:
    "The variables, to the bit."
    with xr.open_dataset(path, engine="h5netcdf") as data:
        arrays = {name: (v.dims, np.asarray(v.values)) for name, v in data.load().variables.items() if not _of_a_clock(name)}
    return {name: (dims, str(a.dtype), a.tolist() if a.dtype == object else a.tobytes()) for name, (dims, a) in arrays.items()}


def _read(path: Path) -> object:
    "What a file holds, but for times."
    if path.suffix == ".tar":
        return _timeless(read_checkpoint(path))
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(path.read_text())), sort_keys=True)
    if path.suffix == ".jsonl":
        return [json.dumps(_timeless(json.loads(line))) for line in path.read_text().splitlines()]
    if path.suffix == ".nc":
        return _netcdf(path)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tobytes() for name in arrays if name != "checkpoint"}  # the hash of a file that holds times
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return {name: file[name][()].tobytes() for name in file} | {"attributes": {name: str(value) for name, value in file.attrs.items()}}
    return path.read_bytes()


UNCOMPARED = {".lock", ".sweep", "latency.json", "files.json"}


def contents(folder: Path) -> dict[str, object]:  # by path in the folder
    "Everything a folder holds."
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in UNCOMPARED and path.suffix != ".log")
    return {str(path.relative_to(folder)): _read(path) for path in files}


if __name__ == "__main__":
    serve()
