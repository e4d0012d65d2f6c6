"""Models, checkpoints, signals, pictures: files of the wrong sort, machines without graphics, terminals that close."""

import json
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import h5py
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import data_tools

ROOT = Path(data_tools.__file__).parents[1]
NET = torch.nn.Linear(2, 3)
MADE_BY = dict(method="skimo", data="maze", skill_dim=10, position_features=True)
AGENT = dict(script="skimo.py", args=dict(env_id="maze"), global_step=7, agent=NET.state_dict())
MODEL = dict(networks=NET.state_dict(), facts={}, made_by=MADE_BY)
STATES = dict(
    agent=AGENT, checkpoint=AGENT | dict(progress=(7,)), model=MODEL,
    unfinished=dict(networks=NET.state_dict(), optimizer={}, progress=(3, 1.0)), flow=dict(flow={}, facts={}),
    earlier=dict(networks=NET.state_dict(), facts={}), other=dict(epoch=3), tensor=torch.zeros(3), list=[1, 2],
)  # fmt: skip


def make(folder, name):
    """A file, by the name of its sort."""
    path = folder / f"{name}.pt"
    if name in STATES:
        torch.save(STATES[name], path)
    elif name == "hdf5":
        h5py.File(path, "w").close()
    elif name == "json":
        path.write_text(json.dumps(dict(seed=1)))
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "cut":
        torch.save(MODEL, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif name == "empty":
        path.touch()
    elif name == "folder":
        path.mkdir()
    elif name == "program":  # what it would run is refused
        torch.save(dict(networks=SimpleNamespace()), path)
    return path


def refused(call, *words):
    """And nobody is told to delete a file."""
    assert "delete" not in conftest.refused(call, *words)


@pytest.mark.parametrize(
    ("name", "wanted", "words"),
    [
        ("agent", "networks", "skimo.py maze --evaluate"),
        ("checkpoint", "networks", "skimo.py maze --evaluate --resume"),
        ("model", "agent", "pre-trained skimo maze --pretrained"),
        ("unfinished", "agent", "unfinished command"),
        ("flow", "networks", "reskill.py"),
        ("earlier", "agent", "networks, facts"),
        ("other", "agent", "epoch"),
        ("tensor", "agent", "Tensor"),
        ("list", "networks", "list"),
        ("hdf5", "agent", "HDF5 --data"),
        ("json", "agent", "JSON"),
        ("cut", "networks", "damaged"),
        ("empty", "networks", "damaged"),
        ("program", "networks", "no model or checkpoint"),
        ("pipe", "networks", "not a regular file"),
        ("folder", "networks", "not a regular file"),
        ("missing", "agent", "does not exist; here.pt"),
    ],
)
def test_what_a_file_is_and_what_fits(name, wanted, words, tmp_path):
    (tmp_path / "here.pt").touch()
    path = make(tmp_path, name)
    refused(lambda: data_tools.read_state(path, [wanted]), path, *words.split())


def test_an_agent_without_a_part_is_of_another_version(tmp_path):
    path = make(tmp_path, "agent")
    refused(lambda: data_tools.read_state(path, ["agent", "novelty"]), path, "has no novelty", "version")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(skill_dim=5), "--skill-dim 10|--skill-dim 5|flags|whole"),
        (dict(position_features=False), "--position-features|--no-position-features"),
        (dict(method="skimo_no_joint"), "method skimo;|method skimo_no_joint|one of this method"),  # shapes agree
        (dict(data="kitchen"), "data maze|data kitchen|task"),
    ],
)
def test_a_model_is_for_its_method_task_and_settings(change, words, tmp_path):
    path = make(tmp_path, "model")
    assert data_tools.read_state(path, dict(networks=NET), made_by=MADE_BY)["made_by"] == MADE_BY
    refused(lambda: data_tools.read_state(path, dict(networks=NET), made_by=MADE_BY | change), path, *words.split("|"))


def test_an_unfinished_model_is_no_pretrained_one(tmp_path):
    path = make(tmp_path, "unfinished")
    refused(lambda: data_tools.read_state(path, dict(networks=NET), made_by=MADE_BY), path, "unfinished", "command")


def test_a_run_is_found_by_its_folder_and_by_what_is_in_it(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.json").write_text(json.dumps(dict(seed=1)))
    checkpoint = make(run, "checkpoint")
    make(run, "part_0123_checkpoint")  # of a program that was killed while it saved
    for path in (run, checkpoint, run / "args.json", f"{run}/"):
        assert data_tools.saved_run(path) == (str(run), dict(seed=1))
        assert list(run.glob("*.pt")) == [checkpoint]
    assert data_tools.read_state(checkpoint.rename(run / "checkpoint.pt").parent, ["agent"])["global_step"] == 7
    refused(lambda: data_tools.saved_run(tmp_path), "args.json", "run")
    refused(lambda: data_tools.saved_run(make(tmp_path, "model")), "--pretrained")
    refused(lambda: data_tools.saved_run(tmp_path / "nowhere"), "nowhere")
    for content in ("{", "[1]", ""):
        (run / "args.json").write_text(content)
        refused(lambda: data_tools.saved_run(run), "args.json")


def test_only_one_program_works_in_a_run_folder(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    code = f"writer = SimpleNamespace(log_dir={str(tmp_path)!r}); data_tools.cut_curves(writer, 0); print(); input()"
    code = f"import data_tools; from types import SimpleNamespace; {code}"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        run.stdout.readline()
        refused(lambda: data_tools.saved_run(tmp_path), tmp_path, "still goes on")
        refused(lambda: data_tools.cut_curves(SimpleNamespace(log_dir=tmp_path), 0), tmp_path, "still goes on")
        run.kill()  # leaves the file
    writer = SimpleNamespace(log_dir=tmp_path)
    data_tools.cut_curves(writer, 0)
    assert data_tools.saved_run(tmp_path)[1] == {}  # the program that has it may go on itself


@pytest.mark.parametrize("phase", ["", "pretrain/", "pretrain/flow"])
def test_a_phase_cuts_its_own_curves(phase, tmp_path):
    """Those of a crashed program from its last saved step on; steps of other phases mean something else."""
    with SummaryWriter(tmp_path) as crashed:
        for step in (1, 2, 3):
            for name in ("losses/q", "pretrain/loss", "pretrain/flow_loss"):
                crashed.add_scalar(name, step, step)
    with SummaryWriter(tmp_path) as writer:
        data_tools.cut_curves(writer, 2, phase)
        writer.lock.release()
    curves = EventAccumulator(str(tmp_path)).Reload()
    cut = {"": ["losses/q"], "pretrain/": ["pretrain/loss", "pretrain/flow_loss"]}.get(phase, ["pretrain/flow_loss"])
    assert len(curves.Tags()["scalars"]) == 3
    for name in curves.Tags()["scalars"]:
        assert [point.step for point in curves.Scalars(name)] == [1, 2, 3][: 2 if name in cut else 3], name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(total_timesteps=20_000, warmup=32_000), "32,000 20,000"),
        (dict(total_timesteps=5_000, warmup=5_000, rate=0.02), "5,050"),
        (dict(total_timesteps=5_000, warmup=0, rate=0.0), "nothing rewards inf"),
        (dict(total_timesteps=6_000, warmup=5_000, rate=0.02), ""),
        (dict(total_timesteps=0, warmup=5_000), ""),  # nobody wants RL
        (dict(total_timesteps=9_000, warmup=0, capture_video=True), "--capture-video --evaluate"),
    ],
)
def test_what_a_run_cannot_do_is_said_at_its_start(settings, words, capsys):
    args = dict(total_timesteps=0, num_envs=16, capture_video=False)
    args |= {name: settings.pop(name) for name in args.keys() & settings.keys()}
    data_tools.check_settings(SimpleNamespace(**args), **settings)
    told = capsys.readouterr().out
    assert told.startswith("warning: ") == bool(words) and all(word in told for word in words.split())


# --------------------------------------------------------------------------------------------------- closed terminals
def wait_in_a_terminal(theirs, ours, path):
    """What a process of its own does; it saves when it is stopped."""
    os.close(ours)
    os.login_tty(theirs)
    sys.stdout = open(1, "w")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # in case nohup has started the tests
    stop = data_tools.stop_event()
    print("ready", flush=True)
    while not stop.is_set():
        time.sleep(0.01)
    print("to a screen that may be gone", flush=True)
    time.sleep(0.3)  # a shell says it twice
    path.write_text("saved")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2"])
def test_signals_of_terminals_and_schedulers_are_heard(name, capfd):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # in case nohup has started this
    stop, number = data_tools.stop_event(), getattr(signal, name)
    seen, set_stop = [], stop.set
    stop.set = lambda: (seen.append(signal.getsignal(number)), set_stop())
    os.kill(os.getpid(), number)
    assert stop.wait(5) and "saves first" in capfd.readouterr().err
    repeats = name in ("SIGHUP", "SIGXCPU")
    assert seen == [signal.SIG_IGN if repeats else signal.SIG_DFL]  # before: set() must not come into set()


@pytest.mark.skipif(sys.platform != "linux", reason="a terminal of Linux")
def test_a_closed_terminal_costs_nothing_and_nohup_stays(tmp_path):
    ours, theirs = pty.openpty()
    copy = multiprocessing.get_context("fork").Process  # of this process, which has imported torch
    process = copy(target=wait_in_a_terminal, args=(theirs, ours, tmp_path / "saved"))
    process.start()
    os.close(theirs)
    assert b"ready" in os.read(ours, 100)
    os.close(ours)
    for _ in range(2):
        os.kill(process.pid, signal.SIGHUP)
        time.sleep(0.1)
    process.join(timeout=60)
    assert process.exitcode == 0 and (tmp_path / "saved").exists()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    data_tools.stop_event()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ------------------------------------------------------------------------------------------------------------- pictures
DRAWS = """
import os, sys
from pathlib import Path
import numpy as np
import data_tools

assert not {"mujoco", "matplotlib", "pooch", "imageio"} & sys.modules.keys()  # the import is light
for number, case in enumerate(sys.argv[1:]):
    if os.fork() == 0:
        break
    status = os.wait()[1]
    Path(f"{number}.code").write_text(str(os.waitstatus_to_exitcode(status)))
else:
    sys.exit()
for descriptor, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
task, *settings = case.split()
os.environ.update(setting.split("=") for setting in settings)
for video in [None, Path(f"{number}.mp4")]:
    envs = data_tools.make_envs(task, 1, video)
    envs.reset(seed=0)
    envs.step(np.zeros(envs.action_space.shape))
    envs.close()
    print("ran", flush=True)
"""


def test_only_pictures_need_graphics(tmp_path):
    """Without video it runs whatever the machine has; with one it ends before the first step, and says why.

    Programs that begin in one, which has imported torch, but neither MuJoCo nor OpenGL: these see each one's settings.
    """
    cases = {  # words of the error, beside the settings
        "maze MUJOCO_GL=no_such_library": None,  # needs no OpenGL
        "kitchen MUJOCO_GL=osmesa PYOPENGL_PLATFORM=egl": "OpenGL",
        "kitchen MUJOCO_GL=egl PYOPENGL_PLATFORM=osmesa": "OpenGL libegl1 libgl1",
        "calvin MUJOCO_EGL_DEVICE_ID=99": "OpenGL libegl1 libgl1",
    }
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", DRAWS, *cases], cwd=tmp_path, env=environment, check=True)
    for number, (case, words) in enumerate(cases.items()):
        code, out, err = ((tmp_path / f"{number}.{name}").read_text() for name in ("code", "out", "err"))
        if words is None:
            assert code == "0" and (tmp_path / f"{number}.mp4").stat().st_size > 0, err
        else:
            assert code == "1" and out == "ran\n" and err.count("\n") == 1, err
            assert err.startswith("error: ") and all(word in err for word in words.split() + case.split()[1:])


def test_a_video_that_cannot_be_written_costs_no_scores(tmp_path, monkeypatch, capsys):
    envs = data_tools.make_envs("maze", 1, tmp_path / "video.mp4")
    envs.reset(seed=0)
    envs.step(np.ones((1, 2)))

    def fail(part):
        raise OSError("No space left on device")

    monkeypatch.setattr(envs, "_write", fail)
    envs.close()
    assert "No space left" in capsys.readouterr().err and envs.steps.tolist() == [1]


def test_files_are_synced_where_they_may_be_written(tmp_path, monkeypatch):
    """Windows refuses fsync of a file that was opened for reading."""
    fcntl = pytest.importorskip("fcntl")
    modes = []
    monkeypatch.setattr(os, "fsync", lambda number: modes.append(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE))
    data_tools.files.write_atomically(tmp_path / "file", lambda part: part.write_text("x"))
    assert modes and os.O_RDONLY not in modes
