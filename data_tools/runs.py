"""What every run needs and no method is about: its folder, pre-trained model, logs, clock, checkpoints, wish to stop.

A run's folder holds `args.json`, TensorBoard events, `episodes.csv` (one row per training episode), `checkpoint.pt`,
`results.json` (once finished), pictures and videos. Its name is {task}__{experiment}__{data}__{seed}__{milliseconds}.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib
import inspect
import json
import platform
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data_tools.dataset import TASKS, cache_dir, load_dataset
from data_tools.diagnostics import MAX_RETURN, cuda_devices, rollout_statistics
from data_tools.files import DataError, NotFiniteError, load_checkpoint, save_checkpoint, write_atomically
from data_tools.vector import num_cores

AT_LEAST_ONE = """num_envs batch_size pretrain_batch_size pretrain_updates pretrain_eval_episodes pretrain_eval_interval
    eval_episodes checkpoint_interval num_skills pretrain_skills skill_horizon skill_dim hidden_dim latent_dim model_dim
    critic_dim warmup_skills bc_chunks num_samples num_policy_trajs num_elites cem_iters
    target_update_interval""".split()
PUBLISHED = Path(__file__).resolve().parents[1] / "benchmarks" / "results"  # the pre-trained models that we ship
CHECKPOINT_VERSION = 4  # raised when older checkpoints of unfinished runs become unusable
EPISODE_COLUMNS = ("env_step", "episodic_return", "episodic_length", "rl_minutes")


def parse_args(Args, task_defaults: dict[str, dict], doc: str, argv: list[str] | None = None):
    """Command line -> Args, whose defaults are those of the chosen --env-id, or of the run that --resume names.

    So `--help` shows the values of the task, and the first line of doc. Exits with one sentence for an unknown task or
    a folder without a run.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env-id", "--env_id", default="maze")
    first.add_argument("--resume")
    first.add_argument("--device")
    chosen, _ = first.parse_known_args(argv)
    if chosen.env_id not in TASKS:
        sys.exit(f"error: --env-id {chosen.env_id} is no task; choose one of {', '.join(TASKS)}")
    default = Args(env_id=chosen.env_id, **task_defaults[chosen.env_id])
    if chosen.resume:
        try:
            default = Args(**json.loads((Path(chosen.resume) / "args.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            sys.exit(f"error: --resume {chosen.resume} is no run folder of this file ({error}); check the path")
    if chosen.device:
        default.compile = chosen.device == "cuda"
    return tyro.cli(Args, args=argv, default=default, description=doc.split("\n")[0])


def check_args(args):
    """Raise DataError for values that cannot work, of those arguments that the algorithm has."""
    given = vars(args)
    least = {name: 0 for name, value in given.items() if type(value) in (int, float)}
    least |= dict.fromkeys(AT_LEAST_ONE, 1) | dict(alpha=1e-6)  # alpha is tuned as a logarithm
    if given.get("plan_start") == "policy":
        least["num_policy_trajs"] = 2  # for their spread
    for name, value in least.items():
        if not value <= given.get(name, value) < float("inf"):  # NaN is neither
            raise DataError(f"--{name.replace('_', '-')} {given[name]} does not work; give at least {value}")
    for name in ("tau", "pretrain_tau", "gamma", "rho", "momentum"):
        if given.get(name, 0) > 1:
            raise DataError(f"--{name.replace('_', '-')} {given[name]} is too large; give at most 1")
    task = importlib.import_module(f"data_tools.{args.env_id.removesuffix('-misaligned')}")
    steps, limit = given.get("num_skills", 1) * args.skill_horizon, task.MAX_EPISODE_STEPS
    if steps > limit:
        flags = "--num-skills or --skill-horizon" if "num_skills" in given else "--skill-horizon"
        raise DataError(f"windows have {steps} env steps, episodes {limit}: lower {flags}")
    if args.pretrained and (args.retrain or args.data):
        raise DataError("--pretrained starts from a model: leave --retrain and --data out")
    if given.get("policy_std", 1.0) <= 1e-4:
        raise DataError(f"--policy-std {args.policy_std} is too small; give more than 1e-4")
    if "num_elites" in given and args.num_elites > args.num_samples + args.num_policy_trajs:
        raise DataError(f"--num-elites {args.num_elites} exceeds --num-samples + --num-policy-trajs; lower it")
    if "bc_chunks" in given and args.bc_chunks > args.pretrain_skills:
        raise DataError(f"--bc-chunks {args.bc_chunks} exceeds --pretrain-skills {args.pretrain_skills}; lower it")
    if "buffer_size" in given and args.buffer_size < args.num_envs:
        message = f"--buffer-size {args.buffer_size} is smaller than --num-envs {args.num_envs}; raise it"
        raise DataError(message)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda, but torch finds no CUDA device; use --device cpu")


@contextlib.contextmanager
def errors_in_one_line():
    """What went wrong with files or the compiler ends the program with a sentence instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:  # before Run.open, from where on StopSignal takes it
        sentence = "stopped before there was anything to save; the same command begins again"
    except (DataError, OSError) as error:  # OSError: a full disk while logging, say
        sentence = f"error: {error}"
    except RuntimeError as error:
        if not isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
            raise
        reason = str(error).split("\n")[0]
        cure = "use --no-compile or, if missing, install a C++ compiler"
        sentence = f"error: torch.compile failed ({reason}); {cure}"
    else:
        return
    for bar in list(getattr(tqdm, "_instances", ())):  # else they would be drawn once more, behind the sentence
        bar.close()
    sys.exit(sentence)


def random_state() -> list[torch.Tensor]:
    """State of torch's random numbers, on the CPU and on the GPU of this process."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda_devices())]


def set_random_state(state: list[torch.Tensor]):
    torch.set_rng_state(state[0])
    for device, value in zip(cuda_devices(), state[1:]):  # a run may go on without a GPU, then not bit for bit
        torch.cuda.set_rng_state(value, device)


def get_state(part) -> dict:
    """State of a module, with its `optimizers` and `num_updates`; of others their own `get_state()`, or attributes."""
    if not isinstance(part, nn.Module):
        return part.get_state() if hasattr(part, "get_state") else dict(vars(part))
    optimizers = [optimizer.state_dict() for optimizer in part.optimizers]
    return dict(weights=part.state_dict(), optimizers=optimizers, num_updates=part.num_updates)


def set_state(part, state: dict):
    """Go on from what `get_state` returned; a part's tensors stay on their device."""
    if not isinstance(part, nn.Module):
        if hasattr(part, "set_state"):
            return part.set_state(state)
        for name, value in state.items():
            setattr(part, name, value.to(vars(part)[name].device) if isinstance(value, torch.Tensor) else value)
        return None
    part.load_state_dict(state["weights"])
    part.num_updates = state["num_updates"]
    for optimizer, saved in zip(part.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)


class StopSignal:
    """Ctrl-C or SIGTERM asks for a stop at the next safe point, where everything is saved; a second one kills."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        self.requested = True
        tqdm.write("stopping: saves at the next safe point (once more: stops at once)")
        signal.signal(number, signal.SIG_DFL)


class Run:
    """One run of an algorithm file: its folder, logs, episodes, clock, checkpoints, and the wish to stop.

    Made in two steps: the constructor refuses a checkpoint that does not fit, `find_pretrained` finds the model or the
    data to make it from, and then makes the folder.
    file_version: of the algorithm file, raised when older models and checkpoints become unusable. model_args and
    run_args: names of the arguments that must be the same in a pre-trained model and a run, and in a run and its
    checkpoint. Raises DataError for files that do not fit and folders that cannot be written.
    """

    SAVED = dict(run="facts global_step next_eval seconds episodes evaluations episodic_return episodic_length".split())
    SAVED["pretraining"] = ["seconds"]  # runs with other arguments of RL may go on with it

    def __init__(self, args, file_version: int, model_args: list[str], run_args: list[str]):
        check_args(args)
        self.args, self.file_version, self.facts = args, file_version, {}
        self.model_args, self.run_args = model_args, model_args + run_args
        self.device = torch.device(args.device)
        torch.set_num_threads(args.num_threads or num_cores())
        self.global_step, self.next_eval, self.seconds = 0, args.eval_interval, {}
        self.episodes = []  # (env step, return, length, minutes) of each training episode
        self.evaluations = []  # (env step, mean return, success) of each clean evaluation
        self.episodic_return = np.zeros(args.num_envs)  # (E,) of the running episodes
        self.episodic_length = np.zeros(args.num_envs, dtype=np.int64)  # (E,) env steps
        self.history = {}  # group -> metrics of the updates since they were last logged
        self.family, self.paths = "", {}  # kind of checkpoint -> path
        self.resumed = bool(args.resume) and (Path(args.resume) / "checkpoint.pt").exists()
        if self.resumed:  # refused before anything is changed
            state = load_checkpoint(Path(args.resume) / "checkpoint.pt", self.meta("run"), "cpu")
            self.facts = state["run"]["facts"]

    def open(self, source: str):
        """Make the run's folder, or take that of --resume; `source` names the offline data."""
        args = self.args
        name = f"{args.env_id}__{args.exp_name}__{source}__{args.seed}__{time.time_ns() // 10**6}"
        self.dir, self.stop = Path(args.resume or Path(args.run_dir) / name), StopSignal()
        self.paths["run"] = self.dir / "checkpoint.pt"
        if args.resume and not self.paths["run"].exists():
            print(f"{self.dir} has no checkpoint yet: RL starts at env step 0", flush=True)
        try:
            self.dir.mkdir(parents=True, exist_ok=bool(args.resume))
        except OSError as error:
            message = f"{self.dir} cannot be written ({error.strerror}); choose another folder with --run-dir"
            raise DataError(message) from error
        write_atomically(self.dir / "args.json", lambda part: part.write_text(json.dumps(asdict(args), indent=1)))
        self.writer = SummaryWriter(self.dir)
        rows = "\n".join(f"|{key}|{value}|" for key, value in {"offline data": source, **asdict(args)}.items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        self.clock = time.time()

    # -------------------------------------------------------------------------------------------- the pre-trained model

    def find_pretrained(self, family: str, pretrain_args: list[str]):
        """Find the pre-trained model, or the data to make it from, and open the run's folder.

        --pretrained names a file. Else the cache is searched, where a model is found by data, version of the algorithm
        file, and every argument that shapes it. `family` begins the files' names: methods that share their pre-training
        share it. A run that goes on in RL needs neither, its checkpoint holds all networks.
        """
        args, self.family, self.data = self.args, family, None
        if self.resumed:
            begun = json.loads((Path(args.resume) / "args.json").read_text())
            for name in (*pretrain_args, "pretrained", "retrain", "data", "dataset", "data_noise"):
                if getattr(args, name) != begun[name]:
                    flag = f"--{name.replace('_', '-')}"
                    raise DataError(f"{flag} cannot change with --resume: leave it out, or begin a new run")
            self.open(self.facts["data"]["source"])
            return
        task = args.env_id.removesuffix("-misaligned")
        if args.pretrained:
            path = PUBLISHED / f"{family}_{task}_pretrained.pt" if args.pretrained == "published" else args.pretrained
            if args.pretrained == "published" and not path.exists():
                raise DataError(f"no {path.name} is published; leave --pretrained out")
            source = load_checkpoint(path, self.meta("pretrained"), "cpu")["facts"]["data"]["source"]
            if args.dataset not in ("auto", source):
                raise DataError(f"{path} was pre-trained on {source} data; use --dataset auto or another model")
        else:
            self.data = load_dataset(
                task, args.data_dir, args.dataset, args.data, args.data_noise, args.allow_pickle, args.accept_any_data
            )
            shape = {name: getattr(args, name) for name in (*self.model_args, *pretrain_args)}
            key = json.dumps([self.data.fingerprint, self.file_version, shape])
            source, key = self.data.source, hashlib.sha256(key.encode()).hexdigest()[:12]
            path = cache_dir(args.data_dir) / "pretrained" / f"{family}_{task}_{source}_{key}.pt"
        self.paths |= {"pretrained": Path(path), "pretraining": Path(path).with_suffix(".unfinished")}
        self.open(source)

    def load_pretrained(self, networks: nn.ModuleDict) -> bool:
        """Put the pre-trained weights into networks; False where they have to be learnt first.

        With a checkpoint of RL the networks wait for its weights. Raises DataError where no model could be written.
        """
        if self.resumed:
            return True
        path, args = self.paths["pretrained"], self.args
        again = args.retrain and not (args.resume and not self.paths["pretraining"].exists())
        if self.data is not None and (again or not path.exists()):
            write_atomically(path.with_name("can_be_written"), lambda part: part.touch(), "--data-dir")
            path.with_name("can_be_written").unlink(missing_ok=True)  # another run may try, too
            return False
        state = load_checkpoint(path, self.meta("pretrained"), self.device)
        print(f"pre-trained model: {path}")
        networks.load_state_dict(state["networks"])
        self.facts = state["facts"]
        return True

    def log_validation(self, metrics: dict, returns, trace, step: int) -> dict:
        """Log losses on held-out data (scalars on the device) and the prior's roll-outs; returns all facts."""
        facts = rollout_statistics(self.args.env_id, returns, trace)
        facts |= {f"valid_{name}": value.item() for name, value in metrics.items()}
        self.log("pretrain", facts, step, self.bar)
        return facts

    def save_pretrained(self, networks: nn.ModuleDict, facts: dict):
        """Put pre-trained networks into the cache, with facts about them."""
        args = self.args
        facts |= dict(minutes=self.seconds["pretrain"] / 60, updates=args.pretrain_updates, seed=args.seed)
        self.facts = facts | dict(data=dict(self.data.attributes, source=self.data.source))
        state = dict(networks=networks.state_dict(), facts=self.facts)
        save_checkpoint(self.paths["pretrained"], state, self.meta("pretrained"))
        self.paths["pretraining"].unlink(missing_ok=True)

    def pretraining(self, trainer):
        """Iterate over the numbers of the gradient updates, from where an interrupted pre-training was saved.

        Saves `trainer` every 2,500 updates; ends the program, after saving, when the user asked to stop.
        """
        self.restore("pretraining", dict(trainer=trainer))
        first, last = trainer.num_updates + 1, self.args.pretrain_updates
        self.bar = tqdm(desc="pre-training", total=last, initial=trainer.num_updates, unit="update")
        for update in range(first, last + 1):
            yield update
            self.bar.update()
            self.lap("pretrain")
            stopped = self.stop.requested
            if update < last and (stopped or update % 2_500 == 0):
                self.save("pretraining", dict(trainer=trainer))
                if stopped:
                    self.bar.close()
                    sys.exit(f"stopped in pre-training; the same command, or --resume {self.dir}, goes on")
        self.bar.close()

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def meta(self, kind: str) -> dict:
        """What must agree before a checkpoint is used: its kind, the algorithm file's version, task and arguments.

        kind: `run`, `pretrained` or `pretraining`, an unfinished one. The two kitchen tasks share pre-trained models.
        """
        args, of_run = self.args, kind == "run"
        owner = Path(inspect.getfile(type(args))).stem if of_run else self.family
        facts = dict(kind=f"{owner} {kind}", file_version=self.file_version)
        facts |= {} if kind == "pretrained" else dict(checkpoint_version=CHECKPOINT_VERSION)
        facts |= dict(env_id=args.env_id if of_run else args.env_id.removesuffix("-misaligned"))
        return facts | {name: getattr(args, name) for name in (self.run_args if of_run else self.model_args)}

    def save(self, kind: str, parts: dict, **values):
        """Write a checkpoint: the state of parts, values (arrays, tensors, numbers), this run's and random numbers.

        Raises NotFiniteError when a weight is NaN or infinite; the checkpoint before stays.
        """
        for module in (part for part in parts.values() if isinstance(part, nn.Module)):
            for name, weight in module.state_dict().items():
                if not weight.isfinite().all():
                    raise self.diverged(f"weight {name}")
        state = {name: get_state(part) for name, part in parts.items()}
        run = {name: getattr(self, name) for name in self.SAVED[kind]}
        state |= dict(values=values, run=run, random=random_state())
        save_checkpoint(self.paths[kind], state, self.meta(kind))

    def diverged(self, what: str) -> NotFiniteError:
        message = f"{what} is no number any more: lower the learning rate"
        return NotFiniteError(f"{message}; --resume {self.dir} goes on from the last checkpoint")

    def restore(self, kind: str, parts: dict, **values) -> list:
        """Go on from what `save` wrote, if there is such a file; returns the values, those given if there is none."""
        path, args = self.paths[kind], self.args
        if not path.exists() or (kind == "pretraining" and args.retrain and not args.resume):
            return list(values.values())
        state = load_checkpoint(path, self.meta(kind), "cpu")
        for name, part in parts.items():
            set_state(part, state[name])
        vars(self).update({name: state["run"][name] for name in self.SAVED[kind]})
        set_random_state(state["random"])
        if kind == "pretraining":
            print(f"pre-training goes on at update {parts['trainer'].num_updates}: {path}")
        return [state["values"][name] for name in values]

    # ------------------------------------------------------------------------------------------------------------- logs

    def log(self, group: str, values: dict, step: int, bar=None):
        """Write scalars to TensorBoard as group/name, and in one line above a progress bar."""
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        if bar is not None:
            bar.write(f"{bar.unit} {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def log_update(self, group: str, metrics: dict, step: int):
        """Log each metric's mean (scalars on the device) over 100 updates; one synchronisation with the device for all.

        In pre-training they stand behind the bar, too. Raises NotFiniteError when one is NaN or infinite.
        """
        history = self.history.setdefault(group, [])
        history.append(torch.stack(list(metrics.values())))  # a copy: a CUDA graph overwrites its outputs
        if len(history) == 100:
            means = dict(zip(metrics, torch.stack(history).mean(0).tolist(), strict=True))
            self.log(group, means, step)
            history.clear()
            if not np.isfinite(list(means.values())).all():  # later it would only show in actions
                wrong = next(name for name, value in means.items() if not np.isfinite(value))
                raise self.diverged(f"{group}/{wrong}")
            if group == "pretrain":
                self.bar.set_postfix({name.removesuffix("_loss"): f"{value:.3g}" for name, value in means.items()})

    def lap(self, part: str | None = None):
        """Count the time since the last lap to this part of the run; to none if it was spent on saving, say."""
        if part == "update" and self.device.type == "cuda":  # a GPU works behind; in RL the planner would wait for it
            torch.cuda.synchronize(self.device)
        last, self.clock = self.clock, time.time()
        if part:
            self.seconds[part] = self.seconds.get(part, 0.0) + self.clock - last

    # ---------------------------------------------------------------------------------------------------- downstream RL

    def start_rl(self, parts: dict, **values) -> list:
        """Begin, or go on from the checkpoint; returns what `restore` returns. Opens the bar and episodes.csv."""
        self.seconds = dict(plan=0.0, env=0.0, update=0.0)
        values = self.restore("run", parts, **values)
        if not self.resumed and (self.dir / "episodes.csv").exists():  # of a run whose checkpoint is gone
            (self.dir / "episodes.csv").replace(self.dir / "episodes_before.csv")
        self._episodes_file = (self.dir / "episodes.csv").open("w", newline="")
        self._episodes = csv.writer(self._episodes_file)
        self._episodes.writerows([EPISODE_COLUMNS, *self.episodes])
        self._episodes_file.flush()
        self.next_save = self.global_step + self.args.checkpoint_interval
        self.bar = tqdm(desc="RL", total=self.args.total_timesteps, initial=self.global_step, unit="step")
        self.lap()
        return values

    def goes_on(self, parts: dict, **values) -> bool:
        """Whether env steps are left to do. Saves (see `save`) when it is time to and at the end.

        Ends the program, after saving, when the user asked to stop.
        """
        stopped = self.stop.requested
        is_over = stopped or self.global_step >= self.args.total_timesteps
        if is_over or self.global_step >= self.next_save:
            self.save("run", parts, **values)
            self.next_save += self.args.checkpoint_interval
        if is_over:
            self.bar.close()
        if stopped:
            sys.exit(f"stopped at env step {self.global_step}; go on with: python {sys.argv[0]} --resume {self.dir}")
        self.lap()  # saving does not count
        return not is_over

    def evaluation_is_due(self) -> bool:
        due = 0 < self.args.eval_interval and self.global_step >= self.next_eval
        self.next_eval += self.args.eval_interval * due
        return due

    def log_evaluation(self, returns, lengths):
        """Log a clean evaluation: returns (E,), lengths (E,) in env steps."""
        success = float((returns >= MAX_RETURN[self.args.env_id]).mean())
        self.evaluations.append((self.global_step, float(returns.mean()), success))
        values = dict(episodic_return=returns.mean(), success=success, episodic_length=lengths.mean())
        self.log("eval", values, self.global_step, self.bar)
        self.lap()  # evaluation does not count

    def log_skill(self, rewards, steps, ended, updates: int):
        """Count one skill of E environments: rewards (E,), env steps (E,), which episodes ended (E,) bool.

        Logs the episodes that ended. `updates`: the gradient updates so far, shown behind the bar.
        """
        self.global_step += int(steps.sum())
        self.bar.update(int(steps.sum()))
        self.episodic_return, self.episodic_length = self.episodic_return + rewards, self.episodic_length + steps
        seconds = sum(self.seconds.values())
        for e in np.flatnonzero(ended):
            episodic_return, episodic_length = float(self.episodic_return[e]), int(self.episodic_length[e])
            self.episodes.append((self.global_step, episodic_return, episodic_length, round(seconds / 60, 3)))
            self._episodes.writerow(self.episodes[-1])
            last_100 = self.last_100()
            values = dict(episodic_return=episodic_return, episodic_length=episodic_length)
            values |= dict(success=last_100["last_100_success"], SPS=self.global_step / seconds)
            self.log("charts", values, self.global_step)
            self.log("time", {part: share / seconds for part, share in self.seconds.items()}, self.global_step)
            self.bar.set_postfix(updates=updates, last_100=f"{last_100['last_100_return']:.3g}")
        if ended.any():
            self._episodes_file.flush()
        self.episodic_return, self.episodic_length = self.episodic_return * ~ended, self.episodic_length * ~ended

    def last_100(self) -> dict:
        """Return and success of the last 100 training episodes (the paper's protocol), None and 0 without one."""
        returns = np.array([episodic_return for _, episodic_return, _, _ in self.episodes[-100:]])
        mean = float(returns.mean()) if len(returns) else None
        success = float((returns >= MAX_RETURN[self.args.env_id]).mean()) if len(returns) else 0.0
        return dict(last_100_return=mean, last_100_success=success)

    def finish(self, updates: int) -> dict:
        """Write results.json, print the summary; returns all of it."""
        args, facts = self.args, dict(env_steps=self.global_step, updates=updates)
        machine = f"{platform.machine()}, {num_cores()} cores, {args.device}, torch {torch.__version__}"
        facts |= dict(rl_minutes=sum(self.seconds.values()) / 60, seconds=self.seconds) | self.last_100()
        facts |= dict(evaluations=self.evaluations, pretraining=self.facts, machine=machine, args=asdict(args))
        write_atomically(self.dir / "results.json", lambda part: part.write_text(json.dumps(facts, indent=1)))
        self._episodes_file.close()
        self.writer.close()
        _, eval_return, eval_success = self.evaluations[-1]
        print(
            f"{args.env_id}: clean evaluation: return {eval_return:.4g}, success {eval_success:.0%}; last 100 training "
            f"episodes: return {facts['last_100_return'] or 0:.4g}, success {facts['last_100_success']:.0%}; "
            f"{self.global_step} env steps in {facts['rl_minutes']:.1f} min.\n"
            f"Pictures, episodes.csv, results.json and checkpoint: {self.dir}; curves: tensorboard --logdir {self.dir}"
        )
        return facts
