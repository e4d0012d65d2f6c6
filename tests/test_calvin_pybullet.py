"""CALVIN with the original's physics, on a stand-in for the simulator's checkout: own URDF files of boxes.

Needs PyBullet, which is optional. The last tests need the real checkout too, under CALVIN_ENV_ROOT.
"""

import functools
import importlib
import io
import os
import sys

import gymnasium
import numpy as np
import pytest
import torch

from data_tools import DataError
from data_tools.scripted import calvin as scripted
from data_tools.scripted import calvin_play
from data_tools.tasks import calvin_pybullet
from data_tools.tasks.calvin import CalvinVectorEnv
from data_tools.tasks.calvin_scene import BLOCKS, HOME
from data_tools.tasks.vector import SingleEnv

SLIDE, DRAWER, BUTTON, SWITCH, BULB, LED = range(15, 21)  # of the observation
REST = np.array([0.0, 0, 0, 0, 0, 0, 1])  # an action that keeps the target pose, gripper open
CalvinEnv = functools.partial(SingleEnv, CalvinVectorEnv)

try:
    importlib.import_module("pybullet")
    MISSING = None
except ImportError as error:
    MISSING = f"PyBullet is optional and not installed ({error}): pip install {calvin_pybullet.PYBULLET}"
needs_pybullet = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
needs_checkout = pytest.mark.skipif(
    MISSING is not None or "CALVIN_ENV_ROOT" not in os.environ,
    reason=MISSING or "CALVIN_ENV_ROOT names no checkout of CALVIN's simulator",
)


# ------------------------------------------------------------------------------------------------------------- stand-in

# The files as the repository https://github.com/mees/calvin_env has them, below its folder data/.
ROBOT_FILE = "franka_panda/panda_longer_finger.urdf"
BLOCK_FILES = ("blocks/block_red_middle.urdf", "blocks/block_blue_small.urdf", "blocks/block_pink_big.urdf")
TABLE_FILE = "calvin_table_D/urdf/calvin_table_D.urdf"
PLANE_FILE = "plane/plane.urdf"


def link(name, mass=0.0, boxes=(), inertia=0.1):
    """A link of boxes ((x, y, z) lowest, highest)."""
    shapes = ""
    for low, high in boxes:
        size, centre = np.subtract(high, low), np.add(high, low) / 2
        shape = f'<origin xyz="{numbers(centre)}"/><geometry><box size="{numbers(size)}"/></geometry>'
        shapes += f"<collision>{shape}</collision>"
    tensor = f'<inertia ixx="{inertia}" iyy="{inertia}" izz="{inertia}" ixy="0" ixz="0" iyz="0"/>'
    return f'<link name="{name}"><inertial><mass value="{mass}"/>{tensor}</inertial>{shapes}</link>'


def joint(name, kind, parent, child, xyz=(0, 0, 0), rpy=(0, 0, 0), axis=(0, 0, 1), limits=(0, 0)):
    """A joint of a URDF file."""
    return (
        f'<joint name="{name}" type="{kind}"><origin xyz="{numbers(xyz)}" rpy="{numbers(rpy)}"/>'
        f'<parent link="{parent}"/><child link="{child}"/><axis xyz="{numbers(axis)}"/>'
        f'<limit lower="{limits[0]}" upper="{limits[1]}" effort="100" velocity="10"/></joint>'
    )


def numbers(values):
    return " ".join(f"{value:.9g}" for value in values)


def robot():
    """The arm by the public description of the Panda, with the hand and joint names of the original."""
    quarter = np.pi / 2
    frames = [((0, 0, 0.333), 0), ((0, 0, 0), -1), ((0, -0.316, 0), 1), ((0.0825, 0, 0), 1), ((-0.0825, 0.384, 0), -1),
              ((0, 0, 0), 1), ((0.088, 0, 0), 1)]  # fmt: skip
    limits = [(-2.9671, 2.9671), (-1.8326, 1.8326), (-2.9671, 2.9671), (-3.1416, 0), (-2.9671, 2.9671),
              (-0.0873, 3.8223), (-2.9671, 2.9671)]  # fmt: skip
    masses = (2.7, 2.73, 2.04, 2.08, 3.0, 1.3, 0.2)
    box = ((-0.03,) * 3, (0.03,) * 3)
    parts = [link("panda_link0", 2.9, [box])]
    for i, ((xyz, turns), limit, mass) in enumerate(zip(frames, limits, masses), start=1):
        parts.append(link(f"panda_link{i}", mass, [box]))
        turn = (turns * quarter, 0, 0)
        parts.append(
            joint(f"panda_joint{i}", "revolute", f"panda_link{i - 1}", f"panda_link{i}", xyz, turn, limits=limit)
        )
    finger = ((-0.01, 0.0, 0.0), (0.01, 0.01, 0.0964))
    mirrored = ((-0.01, -0.01, 0.0), (0.01, 0.0, 0.0964))
    parts += [
        link("panda_hand", 0.81),
        joint("panda_hand_joint", "fixed", "panda_link7", "panda_hand", (0, 0, 0.107), (0, 0, -quarter / 2)),
        link("panda_leftfinger", 0.1, [finger]),
        link("panda_rightfinger", 0.1, [mirrored]),
        link("tcp", 1e-5),
        joint("tcp_joint", "fixed", "panda_hand", "tcp", (0, 0, 0.14)),
    ]
    for number, (side, axis) in enumerate((("left", 1), ("right", -1)), start=1):
        parts.append(
            joint(
                f"panda_finger_joint{number}",
                "prismatic",
                "panda_hand",
                f"panda_{side}finger",
                (0, 0, 0.0584),
                axis=(0, axis, 0),
                limits=(0, 0.04),
            )  # fmt: skip
        )
    return f'<robot name="panda">{"".join(parts)}</robot>'


def table():
    """Table top and the four moving parts as boxes, before the scale 0.8; out of each other's way."""
    quarter = np.pi / 2
    moving = [
        ("button", (-0.15, -0.15, 0.575), (0, 0, -1), 0.025, 0.154, ((-0.04, -0.04, 0), (0.04, 0.04, 0.03))),
        ("switch", (0.375, 0.3, 0.7), (0, 0, 1), 0.11, 0.239, ((-0.05, -0.05, 0), (0.05, 0.05, 0.05))),
        ("slide", (-0.125, 0.3, 0.7), (-1, 0, 0), 0.35, 1.54, ((0, -0.02, 0), (0.35, 0.02, 0.02))),
        ("drawer", (0.2, 0, 0.4), (0, -1, 0), 0.275, 4.23, ((-0.2, -0.2, 0), (0.2, 0, 0.05))),
    ]
    parts = [link("base_link", 0.0, [((-0.55, -0.225, 0.5), (0.55, 0.225, 0.55))])]
    for name, xyz, axis, travel, mass, box in moving:
        parts.append(link(f"{name}_link", mass, [box], inertia=0.01))
        parts.append(
            joint(f"base__{name}", "prismatic", "base_link", f"{name}_link", xyz, axis=axis, limits=(0, travel))
        )
    parts += [link("led_link", 0.2), joint("base__led", "fixed", "base_link", "led_link", (0, 0.2, 1), (quarter, 0, 0))]
    return f'<robot name="table">{"".join(parts)}</robot>'


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the files of the simulator that the driver loads."""
    root = tmp_path_factory.mktemp("calvin_env")
    contents = {ROBOT_FILE: robot(), TABLE_FILE: table()}
    for name, length in zip(BLOCK_FILES, (0.07, 0.05, 0.1)):
        half = np.array([length, 0.05, 0.05]) / 2
        contents[name] = f'<robot name="block">{link("block", 1.0, [(-half, half)], inertia=0.001)}</robot>'
    floor = link("plane", 0.0, [((-5, -5, -1), (5, 5, 0))])
    contents[PLANE_FILE] = f'<robot name="plane">{floor}</robot>'
    for name, text in contents.items():
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def make(checkout, **arguments):
    """One environment on the stand-in, and its PyBullet server."""
    env = CalvinEnv(simulator="pybullet", calvin_env_root=checkout, **arguments)
    return env, env.envs.physics.worlds[0]


def put(world, entry, value):
    """Move a part of the table by hand, at rest."""
    world.client.resetJointState(world.table, world.fixtures[entry - SLIDE], value)


# --------------------------------------------------------------------------------------------------------------- errors


def test_without_pybullet(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybullet", None)  # importing it fails
    with pytest.raises(gymnasium.error.DependencyNotInstalled, match="pip install pybullet==") as caught:
        gymnasium.make("skimo/Calvin-v0", simulator="pybullet")
    assert "\n" not in str(caught.value)


def test_without_checkout(monkeypatch, tmp_path, checkout):
    monkeypatch.delenv("CALVIN_ENV_ROOT", raising=False)
    with pytest.raises(DataError, match="git clone https://.* calvin_env_root=FOLDER or set CALVIN_ENV_ROOT=FOLDER"):
        calvin_pybullet._data_folder(None)
    with pytest.raises(DataError, match="panda_longer_finger.urdf is not in its folder data: git clone"):
        calvin_pybullet._data_folder(tmp_path)
    with pytest.raises(DataError, match="is no checkout"):
        calvin_pybullet._data_folder(checkout / "data")
    monkeypatch.setenv("CALVIN_ENV_ROOT", str(checkout))
    assert calvin_pybullet._data_folder(None) == checkout / "data"
    assert calvin_pybullet._data_folder(str(checkout)) == checkout / "data"
    with pytest.raises(DataError, match="is no checkout"):  # the argument comes first
        calvin_pybullet._data_folder(tmp_path)


@needs_pybullet
@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (TABLE_FILE, "base__switch", "other", "has no joint base__switch"),
        (ROBOT_FILE, "tcp_joint", "other", "has no joint tcp_joint"),
        (TABLE_FILE, "<robot", "<nothing", "PyBullet cannot load .*table_D.urdf"),
        (BLOCK_FILES[1], '<box size="0.05 0.05 0.05"/>', '<mesh filename="none.obj"/>',
         "PyBullet cannot load .*block_blue_small.urdf"),
        (BLOCK_FILES[1], '<box size="0.05 0.05 0.05"/>', '<mesh filename="pointer.obj"/>',
         "found no shape for link -1 of .*block_blue_small.urdf: .*git lfs"),
        (TABLE_FILE, '<box size="1.1 0.45 0.05"/>', '<mesh filename="pointer.obj"/>',
         "found no shape for link -1 of .*calvin_table_D.urdf: .*git lfs"),
    ],
)  # fmt: skip
def test_broken_checkout(checkout, name, old, new, message):
    path = checkout / "data" / name
    text = path.read_text()
    assert old in text
    try:
        path.write_text(text.replace(old, new))
        for pointer in ("pointer.obj", "pointer.stl"):  # what git leaves without its extension for large files
            (path.parent / pointer).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(DataError, match=message):
            make(checkout)
    finally:
        path.write_text(text)


# -------------------------------------------------------------------------------------------------------------- physics


@needs_pybullet
def test_first_observation_equals_the_ports(checkout, monkeypatch):
    # The arm is that of the original: tool (.02587, -.23131, .57128), Euler angles (3.09045, -.02909, 1.50014).
    monkeypatch.setenv("CALVIN_ENV_ROOT", str(checkout))
    env, port = gymnasium.make("skimo/Calvin-v0", simulator="pybullet"), CalvinEnv()
    obs, info = env.reset(seed=5)
    expected, expected_info = port.reset(seed=5)
    assert np.allclose(obs, expected, atol=2e-5) and obs.dtype == expected.dtype and info == expected_info
    blocks, expected = (e.envs.physics.qpos[0, BLOCKS].reshape(3, 7) for e in (env.unwrapped, port))
    assert np.allclose(blocks, expected, atol=5e-3)  # same seed, same places, 1/240 s later
    assert np.allclose(np.linalg.norm(blocks[:, 3:], axis=1), 1)


@pytest.fixture(params=["stand-in", "real"])
def any_checkout(request):
    """The stand-in and, where there is one, the real checkout."""
    if request.param == "stand-in":
        return request.getfixturevalue("checkout")
    if "CALVIN_ENV_ROOT" not in os.environ:
        pytest.skip("CALVIN_ENV_ROOT names no checkout of CALVIN's simulator")
    return os.environ["CALVIN_ENV_ROOT"]


@needs_pybullet
def test_episodes_start_from_the_same_state(any_checkout):
    """The same seed and actions again, on a server on which much has happened in between."""
    env, world = make(any_checkout)

    def episode():
        observations = [env.reset(seed=0)[0]]
        observations += [env.step(busy_actions(step, 1)[0])[0] for step in range(60)]
        return np.array(observations)

    first = episode()
    env.reset(seed=1)
    for entry, value in ((SLIDE, 0.2), (DRAWER, 0.2), (SWITCH, 0.08), (BUTTON, 0.02)):
        put(world, entry, value)
    for step in range(30):
        env.step(-busy_actions(step, 1)[0])
    assert world.client.getContactPoints()
    assert np.array_equal(episode(), first)
    env.step([0, 0, 0, 0, 0, 0, -1])
    obs, _ = env.reset()
    assert np.allclose(obs[SLIDE:], 0, atol=1e-3) and obs[14] == -1  # the gripper's command stays, as in the original
    assert np.allclose(obs[7:14], HOME, atol=1e-5) and obs[6] == pytest.approx(0.08, abs=1e-5)
    assert env.reset(seed=0)[0][14] == 1


@needs_pybullet
def test_another_user_of_the_server_is_one_sentence(checkout):
    env, world = make(checkout)
    env.reset(seed=0)
    state = env.envs.get_state()
    world.client.loadURDF(str(checkout / "data" / PLANE_FILE))  # as calvin_env does, by mistake
    for use in (lambda: env.step(REST), lambda: env.reset(), lambda: env.envs.set_state(state)):
        with pytest.raises(DataError, match="it has 7 bodies instead of 6.*: run the environment in a process of its"):
            use()
    world.client.disconnect()
    with pytest.raises(DataError, match="changed the PyBullet server .*Not connected"):
        env.step(REST)


@needs_pybullet
def test_port_follows_the_original_in_free_motion(checkout):
    # Joint motors, inverse kinematics, fingers and observation lag at once, at different speeds.
    env, port = make(checkout)[0], CalvinEnv()
    env.reset(seed=0), port.reset(seed=0)
    rng = np.random.default_rng(0)
    for step in range(40):
        if step % 10 == 0:
            action = rng.uniform(-1, 1, 7) * [1, 1, 0.3, 1, 1, 1, 1] + [0, 0, 0.3, 0, 0, 0, 0]
        obs, expected = env.step(action)[0], port.step(action)[0]
        difference = np.abs(obs - expected)
        difference[3:6] = np.minimum(difference[3:6], 2 * np.pi - difference[3:6])
        assert difference[:3].max() < 0.004 and difference[3:14].max() < 0.02 and difference[14:].max() < 1e-3
    assert obs[14] in (-1, 1)


@needs_pybullet
def test_tool_pose_is_observed_one_step_of_physics_late(checkout):
    env, world = make(checkout)
    env.reset(seed=0)
    for _ in range(3):
        obs = env.step([1, 0, 0, 0, 0, 0, 1])[0]
    now = world.client.getLinkState(world.robot, world.tool, computeForwardKinematics=1)[0]
    assert np.allclose(obs[:3], env.envs.physics.tool_position[0]) and now[0] - obs[0] > 5e-4
    states = world.client.getJointStates(world.robot, world.arm)
    for joint_number, state in zip(world.arm, states):
        world.client.resetJointState(world.robot, joint_number, state[0] - state[1] / 240)
    before = world.client.getLinkState(world.robot, world.tool, computeForwardKinematics=1)[0]
    assert np.allclose(before, obs[:3], atol=1e-5)


@needs_pybullet
def test_friction_and_spring_of_the_table(checkout):
    env, world = make(checkout)
    env.reset(seed=0)
    for entry, value in ((SLIDE, 0.1), (DRAWER, 0.1), (SWITCH, 0.06), (BUTTON, 0.02)):
        put(world, entry, value)
    for _ in range(20):
        obs = env.step(REST)[0]
    assert np.allclose(obs[[SLIDE, DRAWER, SWITCH]], [0.1, 0.1, 0.06], atol=2e-3)  # they stay where they are left
    assert abs(obs[BUTTON]) < 5e-3  # this one does not


# ------------------------------------------------------------------------------------------------------------- episodes


def busy_actions(step, num_envs):
    """Actions that drive the arms into table and blocks."""
    return np.clip(np.random.default_rng(step // 8).normal(0, 1, (num_envs, 7)) + [0, 0.3, -0.6, 0, 0, 0, 0], -1, 1)


@needs_pybullet
def test_seeds_time_limit_and_members(checkout):
    arguments = {"max_episode_steps": 12, "simulator": "pybullet", "calvin_env_root": checkout}
    envs = CalvinVectorEnv(2, **arguments, autoreset_mode="SameStep")
    single = [CalvinEnv(**arguments) for _ in range(2)]
    observations, _ = envs.reset(seed=3)
    assert np.array_equal(observations, [env.reset(seed=3 + i)[0] for i, env in enumerate(single)])
    for step in range(25):
        actions = busy_actions(step, 2)
        observations, rewards, terminations, truncations, infos = envs.step(actions)
        for i, env in enumerate(single):
            obs, reward, terminated, truncated, _ = env.step(actions[i])
            assert (reward, terminated, truncated) == (rewards[i], terminations[i], truncations[i])
            assert truncated == ((step + 1) % 12 == 0)
            if truncated:
                assert np.array_equal(infos["final_obs"][i], obs)
                obs, _ = env.reset()
            assert np.array_equal(observations[i], obs)


@needs_pybullet
def test_state_round_trip_continues_exactly(checkout):
    arguments = {"simulator": "pybullet", "calvin_env_root": checkout}
    envs = CalvinVectorEnv(2, max_episode_steps=35, **arguments)
    envs.reset(seed=0)
    for step in range(25):
        last_obs = envs.step(busy_actions(step, 2))[0]
    assert envs.physics.worlds[0].client.getContactPoints()
    file = io.BytesIO()
    torch.save(envs.get_state(), file)
    expected = [envs.step(busy_actions(step, 2)) for step in range(25, 45)]
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = CalvinVectorEnv(2, max_episode_steps=35, **arguments)
    assert np.array_equal(other.set_state(state), last_obs)
    for step, result in zip(range(25, 45), expected):
        for left, right in zip(other.step(busy_actions(step, 2))[:4], result):
            assert np.array_equal(left, right)
    with pytest.raises(ValueError, match="2 members"):
        CalvinVectorEnv(1, **arguments).set_state(state)
    with pytest.raises(ValueError, match="another simulator"):
        CalvinVectorEnv(2).set_state(state)
    port = CalvinVectorEnv(2)
    port.reset(seed=0)
    with pytest.raises(ValueError, match="another simulator"):
        other.set_state(port.get_state())


@needs_pybullet
def test_diverged_physics_end_the_episode(checkout, monkeypatch):
    env, world = make(checkout)
    first, _ = env.reset(seed=0)
    before = env.step([1, 0, 0, 0, 0, 0, -1])[0]
    target = env.envs.physics.target.copy()
    with monkeypatch.context() as patch:
        patch.setattr(world, "tool_pose", lambda pose=world.tool_pose: pose() * np.nan)
        obs, reward, terminated, truncated, info = env.step([1, 0, 0, 0, 0, 0, 1])
    assert (reward, terminated, truncated) == (0.0, True, False) and info["unstable"]
    assert np.array_equal(obs, before) and np.array_equal(env.envs.physics.target, target)
    assert np.array_equal(env.reset(seed=0)[0], first)


# --------------------------------------------------------------------------------------------------- the real simulator


@needs_checkout
def test_scripted_expert_earns_the_same_on_the_original():
    env, port = (CalvinVectorEnv(1, autoreset_mode="Disabled", simulator=name) for name in ("pybullet", "mujoco"))
    env.reset(seed=0), port.reset(seed=0)
    script = calvin_play.expert(scripted.view_of(port.physics, 0))
    action, rewards, ended = next(script), [], 0
    while ended <= 5:  # the expert sees the port; the original gets the same actions, and may be a little later
        results = [envs.step(action[None]) for envs in (env, port)]
        rewards.append([result[1][0] for result in results])
        ended += bool(results[1][2][0] or results[1][3][0])
        if not ended:
            action = script.send(scripted.view_of(port.physics, 0))
    rewards = np.array(rewards)
    assert (rewards.sum(axis=0) == 400).all()
    assert np.abs(np.flatnonzero(rewards[:, 0]) - np.flatnonzero(rewards[:, 1])).max() <= 5
