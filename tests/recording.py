"""What the first run of each algorithm file did, noted while it went on; tests/test_runs.py judges it."""

import functools
import inspect
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch

from data_tools.tasks.maze import MazeVectorEnv

NUM_ENVS = 4  # of training; evaluations have two, and what pre-training tries has any number


def recording(module, patch) -> SimpleNamespace:
    """Begins to note what runs of an algorithm's module do, until the patch is undone. Returns the notes."""
    notes = SimpleNamespace()
    note_environments(notes, patch)
    note_replay(notes, module, patch)
    note_losses_and_optimizers(notes, module, patch)
    note_updates(notes, module, patch)
    note_saves(notes, module, patch)
    note_exploring(notes, module, patch)
    note_skills(notes, module, patch)
    if hasattr(module, "RSSM"):
        note_decoder(notes, module, patch)
    return notes


def note_environments(notes, patch):
    """training, evaluations, tried (a list, of pre-training): torch's seed at the reset, its own seed, and of each env
    step what it was given and gave.

    Steps are lists of arrays: observations (E, O), actions (E, A), next observations, rewards, ends, time-outs (E,).
    """
    notes.training = None
    notes.evaluations = []
    notes.tried = []
    seeds = []

    def manual_seed(seed, original=torch.manual_seed):
        seeds.append(seed)
        return original(seed)

    def reset(envs, original=MazeVectorEnv.reset, **how):
        if how.get("seed") is not None:
            envs.notes = SimpleNamespace(torch_seed=seeds[-1], seed=how["seed"], steps=[], skills=[])
            if envs.num_envs == 2:
                notes.evaluations.append(envs.notes)
            else:
                notes.tried += [notes.training] if notes.training else []
                notes.training = envs.notes  # the last one: earlier ones belong to pre-training
        return original(envs, **how)

    def step(envs, action, original=MazeVectorEnv.step):
        before = envs.observations()
        result = original(envs, action)
        envs.notes.steps.append([np.array(value) for value in (before, action, *result[:4])])
        return result

    patch.setattr(torch, "manual_seed", manual_seed)
    patch.setattr(MazeVectorEnv, "reset", reset)
    patch.setattr(MazeVectorEnv, "step", step)


def buffer_of(module):
    (buffer,) = (value for name, value in vars(module).items() if name.endswith("Buffer"))
    return buffer


def note_replay(notes, module, patch):
    """rows: of every addition to the replay the env steps of training so far, and its columns by name; begun: where
    first observations are rows of their own, the same number, whose they are (E,), and all observations (E, O).
    """
    notes.rows = []
    notes.begun = []
    buffer = buffer_of(module)

    def add(rb, *inputs, original=buffer.add, **named):
        row = inspect.signature(original).bind(rb, *inputs, **named).arguments
        if "members" in row:  # only where an episode begins
            notes.begun.append((len(notes.training.steps), row["members"].copy(), row["obs"].copy()))
            return original(rb, *inputs, **named)
        row |= next((value for value in row.values() if isinstance(value, dict)), {})  # what was given by name
        if buffer.__name__ == "SequenceBuffer":  # a row is what led to an observation
            row["next_obs"] = row.pop("obs")
        row = {name: x for name, x in row.items() if not isinstance(x, buffer | list | dict | tuple)}
        row = {name: np.asarray(x).copy() for name, x in row.items()}
        notes.rows.append((len(notes.training.steps), row))
        return original(rb, *inputs, **named)

    patch.setattr(buffer, "add", add)


def note_losses_and_optimizers(notes, module, patch):
    """inputs: for a network that a loss was given, whether it is the agent's part of that name; optimizers: those of
    the agent, by name; moved: how far the first step of each moved a weight, the largest of all; value_lr: the rates of
    weights with "value" in their name, and other_lr, of the others, where there is more than one rate; norms: the
    gradient's norm at every step of each; pretraining_norms: the same at every step of optimizers that no agent has;
    pretraining_lr: their rates.
    """
    notes.inputs = {}
    notes.optimizers = set()
    notes.moved = {}
    notes.value_lr = set()
    notes.other_lr = set()
    notes.norms = defaultdict(list)
    notes.pretraining_norms, notes.pretraining_lr = [], []
    agents = []

    def init(agent, *inputs, original=module.Agent.__init__):
        agents.append(agent)
        original(agent, *inputs)
        owners = [vars(part) for part in agent.modules()]
        found = {name for owner in owners for name in owner if isinstance(owner[name], torch.optim.Optimizer)}
        notes.optimizers |= found

    def checked(loss):
        @functools.wraps(loss)  # inspect.getsource finds the original: the pre-trained model's key stays
        def wrapper(*inputs):
            for name, value in inspect.signature(loss).bind(*inputs).arguments.items():
                owners = [vars(owner)["_modules"] for owner in agents[-1].modules()]
                longer = loss.__name__.replace("loss", name)  # controller_loss's target is the controller_target
                parts = [owner[longer] for owner in owners if longer in owner]
                parts = parts or [owner[name] for owner in owners if name in owner]
                if isinstance(value, torch.nn.Module) and parts:
                    notes.inputs[loss.__name__, name] = any(part is value for part in parts)
            return loss(*inputs)

        return wrapper

    def adam_step(optimizer, *closure, original=torch.optim.Adam.step):
        owners = [vars(part) for agent in agents for part in agent.modules()]
        names = [name for owner in owners for name, value in owner.items() if value is optimizer]
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        before = [weight.detach().clone() for weight in weights]
        gradients = [weight.grad.norm() for weight in weights if weight.grad is not None]
        if not names:
            notes.pretraining_norms.append(torch.stack(gradients).norm().item())
            notes.pretraining_lr.append(optimizer.param_groups[0]["lr"])
        result = original(optimizer, *closure)
        if len(optimizer.param_groups) > 1:
            values = [weight for agent in agents for name, weight in agent.named_parameters() if "value" in name]
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    of_value = any(weight is value for value in values)
                    (notes.value_lr if of_value else notes.other_lr).add(group["lr"])
        for name in names:
            moves = [(weight - old).abs().max().item() for weight, old in zip(weights, before)]
            notes.moved.setdefault(name, max(moves))
            notes.norms[name].append(torch.stack(gradients).norm().item())
        return result

    patch.setattr(module.Agent, "__init__", init)
    patch.setattr(torch.optim.Adam, "step", adam_step)
    for name, loss in list(vars(module).items()):
        if name.endswith("_loss") and name not in ("pretrain_loss", "flow_loss"):
            patch.setattr(module, name, checked(loss))


def note_updates(notes, module, patch):
    """slow, slow_start: the slow copy, and its weights in a row before the first update; online_start: those of the
    networks that it may follow, by name; online: the same after each update, a list; updated_at: the env steps before.
    """
    notes.online = []
    notes.updated_at = []

    def numbers(part):
        return torch.nn.utils.parameters_to_vector(part.parameters()).detach().double()

    def update(agent, *inputs, original=module.Agent.update, **how):
        parts = {name: getattr(agent, name, None) for name in ("model", "critic", "critics")}
        parts = {name: part for name, part in parts.items() if part}
        if not notes.online and hasattr(agent, "target"):
            notes.slow = agent.target
            notes.slow_start = numbers(agent.target)
            notes.online_start = {name: numbers(part) for name, part in parts.items()}
        notes.updated_at.append(NUM_ENVS * len(notes.training.steps))
        metrics = original(agent, *inputs, **how)
        notes.online.append({name: numbers(part) for name, part in parts.items()})
        return metrics

    patch.setattr(module.Agent, "update", update)


def note_saves(notes, module, patch):
    """saved_at: the env steps before each checkpoint."""
    notes.saved_at = []

    def save(path, *inputs, original=module.save):
        if path.name == "checkpoint.pt":
            notes.saved_at.append(NUM_ENVS * len(notes.training.steps))
        return original(path, *inputs)

    patch.setattr(module, "save", save)


def note_exploring(notes, module, patch):
    """explored: whether it explored whenever something was chosen, and for how many environments: {(E, bool), ...};
    planned_at: of each plan of training the env step that the planner was told, and the one that it was; evaluated_at:
    those told elsewhere; remembered: env steps of each choice of training -> the largest number that was kept from the
    choices before; kept: the largest number in an evaluation.
    """
    notes.explored = set()
    notes.planned_at, notes.evaluated_at = [], set()
    notes.remembered = {}
    notes.kept = 0.0

    def choose(actor, *inputs, original, **how):
        bound = inspect.signature(original).bind(actor, *inputs, **how).arguments
        explore = bound.get("explore", vars(actor).get("explore"))
        notes.explored.add((len(bound["obs"]), explore))
        chunks = "choose_chunks" in vars(type(actor))  # qc.py draws them everywhere
        memory = {**vars(actor), **bound}
        kept = [memory[name] for name in ("memory", "last_mean", "left", "last_place") if name in memory]
        kept = [torch.as_tensor(x) for value in kept for x in (value if isinstance(value, list) else [value])]
        largest = max([float(x.abs().max()) for x in kept if x.numel()], default=0.0)
        if len(bound["obs"]) != NUM_ENVS:
            notes.evaluated_at.add(bound.get("global_step"))
            notes.kept = max(notes.kept, largest)
        if len(bound["obs"]) == NUM_ENVS and (explore or chunks):
            steps = len(notes.training.steps)
            if bound.get("global_step") is not None:
                notes.planned_at.append((bound["global_step"], NUM_ENVS * steps))
            notes.remembered[steps] = max(notes.remembered.get(steps, 0.0), largest)
        return original(actor, *inputs, **how)

    def wrapped(owner, name, original):
        patch.setattr(owner, name, lambda *inputs, **how: choose(*inputs, original=original, **how))

    own = [part for part in vars(module).values() if inspect.isclass(part) and part.__module__ == module.__name__]
    for part in own:
        for name in ("act", "choose_skills", "choose_chunks"):
            if name in vars(part):
                known = inspect.signature(vars(part)[name]).parameters.keys()
                explores = "explore" in known | inspect.signature(part).parameters.keys()
                if "obs" in known and (explores or name == "choose_chunks"):
                    wrapped(part, name, vars(part)[name])


def note_skills(notes, module, patch):
    """training.skills: those that were executed, as they are stored."""
    if hasattr(module, "execute_skill"):

        def execute(envs, skills, obs, z, args, original=module.execute_skill):
            half = module.__name__.endswith("tdmpc_skills")  # its model sees skills in (-1, 1)
            envs.notes.skills.append(z.numpy() / 2 if half else z.numpy().copy())
            return original(envs, skills, obs, z, args)

        patch.setattr(module, "execute_skill", execute)


def note_decoder(notes, module, patch):
    """decoder_starts: each time the decoder was begun anew, whether it was with the first batch of all."""
    notes.decoder_starts = []
    batches = []
    buffer = buffer_of(module)

    def sample(rb, size, original=buffer.sample):
        batches.append(original(rb, size))
        return batches[-1]

    def start_decoder(model, obs, original=module.RSSM.start_decoder):
        notes.decoder_starts.append(len(batches) == 1 and obs is batches[0][0])
        original(model, obs)

    patch.setattr(buffer, "sample", sample)
    patch.setattr(module.RSSM, "start_decoder", start_decoder)
