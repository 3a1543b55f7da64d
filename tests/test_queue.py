"""A chain and a sweep through a real Slurm of two nodes, and through a stand-in for PBS that gives scripts PBS's environment; a walltime stop on the way."""
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest

from test_jobs import CONFIG, RUN, wait_for
from turbvit_nb.lab.runs import read_metrics, stages

BIN, ROOT = Path(sys.executable).parent, Path(__file__).resolve().parent.parent
FIRST = 1000 + os.getpid() % 20000  # number of a job: the port where nodes meet follows from it, and others may test here, too
SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
TRAIN = """from turbvit_nb.lab.learner import Callback
from turbvit_nb.train import train


class Slow(Callback):
    def after_batch(self, learner):
        time.sleep(0.1)


run = open_run(config, "train", overrides)
train(run, [Slow()])
run.finish()"""
CHAPTERS = {"02_train": TRAIN, "04_inference": RUN["04_inference"]}
SWEEP = """[sweep]
name = "study"
base = "one.toml"
chapters = ["{folder}/02_train.ipynb"]
run = "study/{{seed}}"
overrides = ["training.epochs=1"]

[sweep.grid]
seed = [0, 1]
"""
QSUB = '''#!{python}
"""Takes a script as PBS does: runs it when what it waits for has succeeded, in an environment of PBS's alone."""
import os, re, subprocess, sys, time
from pathlib import Path

state, script = Path(os.environ.get("PBS_HOME", "{state}")), Path(sys.argv[-1])
needs = re.findall(r"afterok:(\\S+)", " ".join(sys.argv[1:-1]))
number = f"{{{first} + len(list(state.glob('*.sh')))}}.stand-in"
(state / f"{{number}}.sh").write_text(script.read_text())
print(number, flush=True)
if os.fork():
    os._exit(0)
os.setsid()
for stream in (1, 2):  # whoever submits waits for their end
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
code = lambda job: int((state / f"{{job}}.code").read_text())
while not all((state / f"{{job}}.code").exists() for job in needs):
    time.sleep(0.1)
codes = [1] if any(map(code, needs)) else []
nodes = int(re.search(r"^#PBS -l select=(\\d+)", script.read_text(), re.M)[1])
(state / f"{{number}}.nodes").write_text("".join(f"node{{i}}\\n" for i in range(nodes)))
array = re.search(r"^#PBS -J (\\d+)-(\\d+)$", script.read_text(), re.M)
for index in [] if codes else range(int(array[1]), int(array[2]) + 1) if array else [None]:
    own = {{"HOME": os.environ["HOME"], "PATH": "/usr/bin:/bin", "PBS_O_WORKDIR": os.getcwd(), "PBS_JOBID": number, "PBS_NODEFILE": str(state / f"{{number}}.nodes"), "PBS_ENVIRONMENT": "PBS_BATCH"}}
    own |= {{}} if index is None else {{"PBS_ARRAY_INDEX": str(index)}}
    with open(state / f"{{number}}.log", "a") as log:
        codes.append(subprocess.run(["bash", state / f"{{number}}.sh"], env=own, cwd="/", stdout=log, stderr=log).returncode)
(state / f"{{number}}.part").write_text(str(max(codes)))
os.rename(state / f"{{number}}.part", state / f"{{number}}.code")
'''
TMRSH = '''#!/bin/bash
# Starts a command on a node of the job as PBS does, in an environment of PBS's alone.
grep -qx "$1" "$PBS_NODEFILE" && [ "$1" != node0 ] || exit 255
cd / && exec env -i HOME="$HOME" PATH=/usr/bin:/bin PBS_JOBID="$PBS_JOBID" PBS_ENVIRONMENT=PBS_BATCH "${@:2}"
'''
CONF = """ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
SlurmctldPort={ports[0]}
FirstJobId={first}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    "Ports that nobody listens on."
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


def real_slurm(home: Path, monkeypatch):
    "A Slurm of this one machine, which is two nodes; the test is skipped where it cannot be started."
    if missing := [name for name in SLURM if shutil.which(name) is None]:
        pytest.skip(f"no {missing[0]} on the PATH: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started by root only")
    for name in ("state", "spool-node0", "spool-node1"):
        (home / name).mkdir()
    (home / "munge.key").write_bytes(os.urandom(1024))
    (home / "munge.key").chmod(0o400)
    home.chmod(0o755)
    (home / "slurm.conf").write_text(CONF.format(host=socket.gethostname().split(".")[0], home=home, ports=free_ports(3), first=FIRST))
    monkeypatch.setenv("SLURM_CONF", str(home / "slurm.conf"))
    own = [f"--{what}={home}/munge.{what.split('-')[0]}" for what in ("socket", "pid-file", "log-file", "seed-file")]
    subprocess.run(["munged", "--force", f"--key-file={home}/munge.key", *own], check=True)
    for daemon in (["slurmctld"], ["slurmd", "-N", "node0"], ["slurmd", "-N", "node1"]):
        subprocess.run(daemon, check=True)
    deadline = time.monotonic() + 30
    while subprocess.run(["sinfo", "-hN"], capture_output=True, text=True).stdout.count("idle") < 2:
        if time.monotonic() > deadline:
            pytest.skip(f"Slurm does not come up here: {(home / 'node1.log').read_text()[-300:]}")
        time.sleep(0.2)


def ended(home: Path) -> None:
    "Stop Slurm's daemons."
    for name in ("node0", "node1", "slurmctld", "munge"):
        if (file := home / f"{name}.pid").exists():
            try:
                os.kill(int(file.read_text()), signal.SIGTERM)
            except ProcessLookupError:
                pass


@pytest.fixture(params=["slurm", pytest.param("pbs", marks=pytest.mark.soak)])
def site(request, tmp_path, monkeypatch):
    "A place with a queue: chapters, a config, and the user's file. Yields the name of the system."
    place = Path(tempfile.mkdtemp(prefix="queue-"))  # a short path: sockets have one
    monkeypatch.setenv("TURBVIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TURBVIT_DATA", str(tmp_path))
    monkeypatch.setenv("TURBVIT_QUEUE", str(tmp_path / "queue.toml"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{place}:{BIN}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    if request.param == "slurm":
        real_slurm(place, monkeypatch)
    else:
        for program, text in {"qsub": QSUB.format(python=sys.executable, state=place, first=FIRST), "pbs_tmrsh": TMRSH}.items():
            (place / program).write_text(text)
            (place / program).chmod(stat.S_IRWXU)
    for name, work in CHAPTERS.items():
        cells = [nbformat.v4.new_code_cell('config: str = ""\noverrides: list = []', metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell("import time\nfrom turbvit_nb.lab.runs import open_run"), nbformat.v4.new_markdown_cell("## Run"), nbformat.v4.new_code_cell(work)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    (tmp_path / "one.toml").write_text(CONFIG.format(name="it's one", epochs=6))
    (tmp_path / "study.toml").write_text(SWEEP.format(folder=tmp_path))
    setup = [f"export PATH={place}:{BIN}:$PATH", f"export PYTHONPATH='{ROOT}'", "export TURBVIT_PROGRESS=0"]
    (tmp_path / "queue.toml").write_text(f'system = "{request.param}"\nwalltime = "0:30:00"\ncpus = 1\nmemory = "500mb"\nsetup = {setup}\n')
    yield request.param
    ended(place)
    shutil.rmtree(place, ignore_errors=True)


def turbvit(*words: str) -> str:
    "What the command says."
    done = subprocess.run([BIN / "turbvit", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def state_of(folder: Path, stage: str) -> str:
    "Of a stage, which may not have begun."
    return stages(folder).get(stage, {}).get("state", "") if (folder / "status.json").exists() else ""


def test_a_chain_with_a_walltime_stop(site, tmp_path):
    "A training that is stopped by its clock goes on in another job, with what comes after it; it ends as if one job had been enough."
    names = ",".join(str(tmp_path / f"{name}.ipynb") for name in CHAPTERS)
    folder = tmp_path / "runs" / "it's one"
    assert "#SBATCH" in turbvit("submit", "one.toml", "--stages", names, "--dry-run") if site == "slurm" else True
    assert not folder.exists()
    said = turbvit("submit", "one.toml", "--stages", names, "--set", "training.max_hours=0.0015")
    assert len(said.splitlines()) == 2 and "it_s_one-04_inference.sh" in said
    wait_for(lambda: state_of(folder, "inference") == "done", 900)
    rows = read_metrics(folder, stage="train")
    assert stages(folder)["train"]["state"] == "done" and [row["epoch"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    if site == "slurm":
        logs = {name: sorted((folder / "queue").glob(f"*{name}.*.log")) for name in CHAPTERS}
        assert len(logs["02_train"]) > 1 and len(logs["04_inference"]) == 1, "the training took one job, or the rollout was begun before it was done"
        wait_for(lambda: not subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout, 20)
    with pytest.raises(AssertionError, match="nothing to submit"):
        turbvit("submit", "one.toml", "--stages", names)


@pytest.mark.soak
def test_a_sweep_is_an_array(site, tmp_path):
    "Of jobs whose chapters have the ranks that the user's file gives them."
    with open(tmp_path / "queue.toml", "a") as file:
        file.write("[stages.02]\nranks = 2\n")
    said = turbvit("submit", "study.toml")
    assert len(said.splitlines()) == 1 and "study-1.sh" in said
    assert (tmp_path / "runs/study/queue/study-1.runs").read_text() == "study/0\nstudy/1\n"
    folders = [tmp_path / "runs" / f"study/{seed}" for seed in (0, 1)]
    wait_for(lambda: all(state_of(folder, "train") == "done" for folder in folders), 900)
    assert all((folder / "ranks" / "02_train.rank1.log").exists() for folder in folders)


@pytest.mark.soak
def test_a_training_on_two_nodes(site, tmp_path):
    "A rank on each, stopped by its clock and gone on with by another job of two nodes."
    with open(tmp_path / "queue.toml", "a") as file:
        file.write("[stages.train]\nnodes = 2\n")
    folder = tmp_path / "runs" / "it's one"
    turbvit("submit", "one.toml", "--stages", f"{tmp_path}/02_train.ipynb", "--set", "training.max_hours=0.0015")
    wait_for(lambda: state_of(folder, "train") == "done" and (folder / "02_train.html").exists(), 900)
    rows = read_metrics(folder, stage="train")
    assert [row["epoch"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in (folder / "ranks").glob("*.log")] == ["02_train.rank1.log"]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})


STUB = """#!/bin/bash
echo "$@" >> {folder}/said
[ "$1" = run ] && {work} exit {code}
exit 0
"""


@pytest.mark.parametrize("work, code, again", [("touch '{run}/checkpoints/last.tar';", 143, True), ("", 143, False), ("touch '{run}/metrics.jsonl';", 75, False), ("", 0, False), ("", 1, False)])
def test_a_job_goes_on_only_while_it_gets_somewhere(tmp_path, monkeypatch, work, code, again):
    "The script itself, with a program that stops: with something new in the run folder, with nothing, and with notes only."
    from turbvit_nb.lab.jobs import find_chapter
    from turbvit_nb.lab.queue import QueueConfig, chapter_script, written

    monkeypatch.chdir(tmp_path)
    run, stub = tmp_path / "a run", tmp_path / "turbvit"
    (run / "checkpoints").mkdir(parents=True)
    stub.write_text(STUB.format(folder=tmp_path, work=work.format(run=run), code=code))
    stub.chmod(stat.S_IRWXU)
    queue, train = QueueConfig(system="pbs"), find_chapter("02_train")
    script = chapter_script(train, run, tmp_path / "one.toml", ["seed=1"], queue, [train, find_chapter("03_prune")], [str(stub)])
    assert subprocess.run([written(script, queue)], capture_output=True).returncode == code
    said = (tmp_path / "said").read_text().splitlines()
    assert said[0] == f"run 02_train {tmp_path}/one.toml --set seed=1"
    assert said[1:] == ([f"submit {run} --stages 02_train,03_prune"] if again else [])
