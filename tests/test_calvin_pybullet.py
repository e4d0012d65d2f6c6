"""The adapter to CALVIN's original physics, on a stand-in for the simulator's checkout: PyBullet's own arm, boxes.

Needs PyBullet, which is optional. Two tests take the real checkout, under CALVIN_ENV_ROOT, where there is one.
"""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from test_calvin import BUTTON, DRAWER, REST, SLIDE, SWITCH, CalvinEnv

from data_tools import DataError
from data_tools.scripted import calvin as scripted
from data_tools.scripted import calvin_play
from data_tools.tasks import calvin_pybullet
from data_tools.tasks.calvin import CalvinVectorEnv
from data_tools.tasks.calvin_pybullet import BLOCK_FILES, PLANE_FILE, ROBOT_FILE, TABLE_FILE
from data_tools.tasks.calvin_scene import BLOCKS, HOME

MISSING = importlib.util.find_spec("pybullet") is None
needs_pybullet = pytest.mark.skipif(MISSING, reason=f"optional: pip install {calvin_pybullet.PYBULLET}")
ROOT = os.environ.get("CALVIN_ENV_ROOT")
needs_checkout = pytest.mark.skipif(MISSING or ROOT is None, reason="CALVIN_ENV_ROOT names no checkout")


def link(name, mass, low, high, inertia=0.01):
    """A link that is a box between two corners."""
    size, centre = (" ".join(map(str, values)) for values in (np.subtract(high, low), np.add(high, low) / 2))
    tensor = f'<inertia ixx="{inertia}" iyy="{inertia}" izz="{inertia}" ixy="0" ixz="0" iyz="0"/>'
    shape = f'<collision><origin xyz="{centre}"/><geometry><box size="{size}"/></geometry></collision>'
    return f'<link name="{name}"><inertial><mass value="{mass}"/>{tensor}</inertial>{shape}</link>'


def fixture(name, xyz, axis, travel, mass, low, high):
    """A moving part of the table."""
    return link(f"{name}_link", mass, low, high) + (
        f'<joint name="base__{name}" type="prismatic"><origin xyz="{xyz}"/><parent link="base_link"/>'
        f'<child link="{name}_link"/><axis xyz="{axis}"/><limit lower="0" upper="{travel}" effort="9" velocity="9"/>'
        "</joint>"
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the files of the simulator that the adapter loads; sizes before the scale 0.8."""
    bullets = Path(importlib.util.find_spec("pybullet_data").origin).parent
    data = tmp_path_factory.mktemp("calvin_env") / "data"
    arm = (bullets / "franka_panda" / "panda.urdf").read_text()
    contents = {ROBOT_FILE: arm.replace("panda_grasptarget_hand", "tcp_joint").replace("0 0 0.105", "0 0 0.14")}
    contents[TABLE_FILE] = link("base_link", 0, (-0.55, -0.225, 0.5), (0.55, 0.225, 0.55)) + "".join(
        [
            fixture("button", "-0.15 -0.15 0.575", "0 0 -1", 0.025, 0.154, (-0.04, -0.04, 0), (0.04, 0.04, 0.03)),
            fixture("switch", "0.375 0.3 0.7", "0 0 1", 0.11, 0.239, (-0.05, -0.05, 0), (0.05, 0.05, 0.05)),
            fixture("slide", "-0.125 0.3 0.7", "-1 0 0", 0.35, 1.54, (0, -0.02, 0), (0.35, 0.02, 0.02)),
            fixture("drawer", "0.2 0 0.4", "0 -1 0", 0.275, 4.23, (-0.2, -0.2, 0), (0.2, 0, 0.05)),
        ]
    )
    for name, length in zip(BLOCK_FILES, (0.035, 0.025, 0.05)):
        contents[name] = link("block", 1, (-length, -0.025, -0.025), (length, 0.025, 0.025), 0.001)
    contents[PLANE_FILE] = link("plane", 0, (-5, -5, -1), (5, 5, 0))
    for name, text in contents.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(text if name == ROBOT_FILE else f'<robot name="it">{text}</robot>')
    (data / ROBOT_FILE).with_name("meshes").symlink_to(bullets / "franka_panda" / "meshes")
    return data.parent


def make(checkout):
    """One environment on the stand-in, and its PyBullet server."""
    env = CalvinEnv(simulator="pybullet", calvin_env_root=checkout)
    return env, env.envs.physics.worlds[0]


def busy_actions(step, num_envs):
    """Actions that drive the arms into table and blocks."""
    return np.clip(np.random.default_rng(step // 8).normal(0, 1, (num_envs, 7)) + [0, 0.3, -0.6, 0, 0, 0, 0], -1, 1)


def test_without_pybullet(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybullet", None)  # importing it fails
    with pytest.raises(gymnasium.error.DependencyNotInstalled, match="pip install pybullet=="):
        gymnasium.make("skimo/Calvin-v0", simulator="pybullet")


def test_without_checkout(monkeypatch, tmp_path):
    monkeypatch.delenv("CALVIN_ENV_ROOT", raising=False)
    for root, message in ((None, "git clone https://"), (tmp_path, "panda_longer_finger.urdf is not in its folder")):
        with pytest.raises(DataError, match=message):
            calvin_pybullet._data_folder(root)
    for name in calvin_pybullet.FILES:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    monkeypatch.setenv("CALVIN_ENV_ROOT", str(tmp_path))
    assert calvin_pybullet._data_folder(None) == tmp_path / "data"


@needs_pybullet
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<robot", "<nothing", "PyBullet cannot load .*table_D.urdf"),
        ('<box size="1.1 0.45 0.05', '<mesh filename="pointer.obj', "found no shape for link -1 of .*table_D.urdf"),
    ],
)
def test_broken_checkout(checkout, old, new, message):
    path = checkout / "data" / TABLE_FILE
    text = path.read_text()
    # What git leaves without its extension for large files
    (path.parent / "pointer.obj").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    path.write_text(re.sub(f"{old}[0-9]*", new, text))
    try:
        with pytest.raises(DataError, match=message):
            make(checkout)
    finally:
        path.write_text(text)


@needs_pybullet
def test_the_port_follows_the_original_in_free_motion(checkout):
    """From the same first observation: joint motors, inverse kinematics, fingers and observation lag at once."""
    env, port = make(checkout)[0], CalvinEnv()
    first, expected = env.reset(seed=5), port.reset(seed=5)
    assert np.allclose(first[0], expected[0], atol=2e-5) and first[0].dtype == np.float32 and first[1] == expected[1]
    blocks, places = (e.envs.physics.qpos[0, BLOCKS].reshape(3, 7) for e in (env, port))
    assert np.allclose(blocks, places, atol=5e-3)  # same seed, same places, 1/240 s later
    rng = np.random.default_rng(0)
    for step in range(40):
        if step % 10 == 0:
            action = rng.uniform(-1, 1, 7) * [1, 1, 0.3, 1, 1, 1, 1] + [0, 0, 0.3, 0, 0, 0, 0]
        difference = np.abs(env.step(action)[0] - port.step(action)[0])
        difference[3:6] = np.minimum(difference[3:6], 2 * np.pi - difference[3:6])
        assert difference[:3].max() < 0.004 and difference[3:14].max() < 0.02 and difference[14:].max() < 1e-3


@needs_pybullet
def test_friction_and_spring_of_the_table(checkout):
    env, world = make(checkout)
    env.reset(seed=0)
    for entry, value in ((SLIDE, 0.1), (DRAWER, 0.1), (SWITCH, 0.06), (BUTTON, 0.02)):
        world.client.resetJointState(world.table, world.fixtures[entry - SLIDE], value)
    for _ in range(20):
        obs = env.step(REST)[0]
    assert np.allclose(obs[[SLIDE, DRAWER, SWITCH]], [0.1, 0.1, 0.06], atol=2e-3)  # they stay where they are left
    assert abs(obs[BUTTON]) < 5e-3  # this one does not


@needs_pybullet
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=needs_checkout)])
def test_episodes_repeat_exactly(real, checkout):
    """The same seed and actions again, on a server on which much has happened in between."""
    env, world = make(ROOT if real else checkout)

    def episode():
        return np.array([env.reset(seed=0)[0]] + [env.step(busy_actions(step, 1)[0])[0] for step in range(60)])

    first = episode()
    env.reset(seed=1)
    for step in range(30):
        env.step(-busy_actions(step, 1)[0])
    assert world.client.getContactPoints()
    assert np.array_equal(episode(), first)
    env.step([0, 0, 0, 0, 0, 0, -1])
    obs, _ = env.reset()
    assert np.allclose(obs[SLIDE:], 0, atol=1e-3) and obs[14] == -1  # the gripper's command stays, as in the original
    assert np.allclose(obs[7:14], HOME, atol=1e-5) and env.reset(seed=0)[0][14] == 1


@needs_pybullet
def test_states_go_on_exactly_and_members_wait(checkout):
    arguments = {"max_episode_steps": 30, "simulator": "pybullet", "calvin_env_root": checkout}
    envs, other = CalvinVectorEnv(2, **arguments), CalvinVectorEnv(2, **arguments)
    envs.reset(seed=0)
    for step in range(10):
        envs.step(busy_actions(step, 2))
    envs.reset(options={"reset_mask": np.array([False, True])})  # the first ends 10 steps before the second
    for step in range(10, 25):
        obs = envs.step(busy_actions(step, 2))[0]
    state = json.loads(json.dumps(envs.get_state()))
    assert np.array_equal(other.set_state(state), obs)
    for step in range(25, 45):
        results = [each.step(busy_actions(step, 2))[:4] for each in (envs, other)]
        assert all(np.array_equal(*pair) for pair in zip(*results))
        obs, last = results[0][0], obs
        assert np.array_equal(obs[0], last[0]) == (step >= 30)
    port = CalvinVectorEnv(2)
    port.reset(seed=0)
    for target, foreign in ((port, state), (other, port.get_state())):
        with pytest.raises(ValueError, match="another simulator"):
            target.set_state(foreign)


@needs_pybullet
def test_diverged_physics_end_the_episode(checkout, monkeypatch):
    env, world = make(checkout)
    first, _ = env.reset(seed=0)
    before = env.step([1, 0, 0, 0, 0, 0, -1])[0]
    with monkeypatch.context() as patch:
        patch.setattr(world, "tool_pose", lambda pose=world.tool_pose: pose() * np.nan)
        obs, reward, terminated, truncated, info = env.step([1, 0, 0, 0, 0, 0, 1])
    assert (reward, terminated, truncated) == (0.0, True, False) and info["unstable"]
    assert np.array_equal(obs, before) and np.array_equal(env.reset(seed=0)[0], first)


@needs_checkout
def test_scripted_expert_earns_the_same_on_the_original():
    envs = [CalvinVectorEnv(1, simulator=name) for name in ("pybullet", "mujoco")]
    for each in envs:
        each.reset(seed=0)
    physics = envs[1].physics  # the expert sees the port; the original gets the same actions
    script = calvin_play.expert(scripted.view_of(physics, 0))
    action = next(script)
    while not envs[1].waiting[0]:
        for each in envs:
            each.step(action[None])
        action = script.send(scripted.view_of(physics, 0))
    for _ in range(5):  # it may be a little later
        envs[0].step(action[None])
    assert envs[0].returns[0] == envs[1].returns[0] == 400
