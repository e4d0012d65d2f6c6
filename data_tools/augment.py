"""More data from the same data: episodes among objects that others have moved, arms beside where they were shown."""

import ast
import hashlib
import inspect
import textwrap

import numpy as np
import torch

from data_tools.dataset import OfflineDataset
from data_tools.files import DataError


def recombined(data: OfflineDataset, objects, seed: int = 0, moved_by: float = 0.1) -> OfflineDataset:
    """Return the episodes and each of them once more, among objects that others have moved.

    objects: for each object, its entries in an observation; one that changes by more than moved_by has been moved
    (people's data hold noise of 0.02). What nobody touches in an episode hardly changes what
    happens there: whoever shows the light switch beside a closed microwave has also shown it beside an open one
    (CoDA, Pitis et al. 2020, https://arxiv.org/abs/2007.02863). In a repeated episode each untouched object is
    where it was or, as often, where another episode has left it; sensors' noise stays.
    """
    if not objects:
        raise DataError("--recombine: the entry of this task in TASKS names no objects.")
    arrays = [x.cpu().numpy() for x in (data.observations, data.actions, data.terminals, data.timeouts)]
    arrays[3] = arrays[3].copy()
    arrays[3][-1] |= not arrays[2][-1]  # the last episode ends before the first repeated one begins
    obs = arrays[0].copy()  # (R, O)
    cuts = data.episode_starts[1:].cpu().numpy()
    dice = np.random.default_rng(seed)
    for entries in objects:
        paths = np.split(obs[:, entries], cuts)  # (rows, entries) of each episode
        moved = [bool((np.ptp(path, axis=0) > moved_by).any()) for path in paths]
        ends = [path[-1] for path, was_moved in zip(paths, moved) if was_moved]
        for i, path in enumerate(paths):
            if ends and not moved[i] and dice.random() < 0.5:
                paths[i] = path - path.mean(0) + ends[dice.integers(len(ends))]
        obs[:, entries] = np.concatenate(paths)
    arrays = [np.concatenate([x, again]) for x, again in zip(arrays, [obs, *arrays[1:]])]
    return OfflineDataset(*arrays, attributes=data.attributes, device=data.device)


def perturb(obs, actions, arm: tuple[int, float] | None, std: float):
    """Put the arm a little beside where it was shown, with the actions that lead back to what was shown.

    obs (B, T+1, O), actions (B, T, A); arm: Task.arm; std of the shifts in rad. An action asks for a joint position
    relative to the observed one, so a shift of that has a known correction. Without it the skill policy learns people's
    paths, but not how to stay on them.
    """
    if std == 0:
        return obs, actions
    if arm is None:
        raise DataError("--arm-noise: the entry of this task in TASKS names no arm.")
    J, reach = arm
    shift = std * torch.randn_like(obs[..., :J])  # (B, T+1, J)
    shifted = obs[..., :J] + shift
    corrected = actions[..., :J] - shift[:, :-1] / reach
    obs = torch.cat([shifted, obs[..., J:]], -1)
    actions = torch.cat([corrected.clamp(-1, 1), actions[..., J:]], -1)
    return obs, actions


def code_of(source: str) -> str:
    """Return a hash of Python code and of what draws batches here: comments and docstrings do not change it.

    Pre-trained models are found again by it: whoever changes networks, loss, sampling or Python gets a new model.
    """
    sampling = [OfflineDataset.split, OfflineDataset.sample_windows, OfflineDataset._window_table]
    sampling += [OfflineDataset.sample_pairs, recombined, perturb]
    digest = hashlib.sha256()
    for text in (source, *map(inspect.getsource, sampling)):
        tree = ast.parse(textwrap.dedent(text))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
                del node.body[0]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()
