"""The scene of the CALVIN task as MuJoCo models: arm, table with its four moving parts, three blocks; primitives only.

Geometry, masses and friction follow scene D of the CALVIN simulator (https://arxiv.org/abs/2112.03227), whose table is
scaled by 0.8; all numbers here are scaled already. Metres, kilograms, radians; x right, y away from the robot, z up,
the origin below the table on the floor. The order of the joints is fixed, so that slices name them:
qpos = arm 7, fingers 2, slide, drawer, button, switch, then (position 3, quaternion 4) of each block.
"""

from functools import cache
from math import atan2, cos, hypot, pi, radians, sin

import mujoco
import numpy as np

TIME_STEP = 1 / 240  # s
POSITION_SCALE = 0.02  # m that one unit of action moves the target pose of the tool
ANGLE_SCALE = 0.05  # rad, likewise
ARM = slice(0, 7)
FINGERS = slice(7, 9)
ROBOT = slice(0, 9)
FIXTURES = slice(9, 13)  # slide, drawer, button, switch: the order of the observation
BLOCKS = slice(13, 34)  # of qpos only

HOME = np.array([-1.21779206, 1.03987646, 2.11978261, -2.34205014, -0.87015947, 1.64119353, 0.55344866])  # rad
FINGER_OPEN = 0.04  # m, of each finger
SLIDE_RANGE, DRAWER_RANGE, BUTTON_RANGE, SWITCH_RANGE = 0.28, 0.22, 0.02, 0.088  # m
BLOCK_NAMES = ("red", "blue", "pink")
BLOCK_HALF_LENGTHS = (0.028, 0.02, 0.04)  # along the block's x; half of width and height is 0.02
BLOCK_HEIGHT = 0.46  # of the centre when placed
# A block starts on the table, on the left or on the right part of the shelf: (x, y) lowest and highest.
SURFACES = (((0.0, -0.15), (0.35, -0.03)), ((-0.32, 0.05), (-0.16, 0.12)), ((-0.05, 0.05), (0.13, 0.12)))
BUTTON_WEIGHT = -0.00063  # m; the rest position of the button's spring, so that it carries the button's weight

# MuJoCo combines the friction of two geoms by their maximum, Bullet by their product. These values give Bullet's
# products: finger-block 0.7, finger-table 0.5 (here 0.7), block-table 0.35, robot-table 0.25 (here 0.35).
FRICTION = {"table": 0.35, "robot": 0.25, "finger": 0.7, "block": 0.35}

SLANT = pi / 3  # of the cabinet's front, with the slider panel and the switch
# Origin and axes (y, z) of the switch's frame, which lies in the slanted front; the switch moves along -z.
SWITCH_ORIGIN = np.array([0.3, 0.060928, 0.49489])
SWITCH_Y = np.array([0.0, -cos(pi / 6), sin(pi / 6)])  # out of the front, towards the robot
SWITCH_Z = np.array([0.0, -sin(pi / 6), -cos(pi / 6)])  # down the front


def _numbers(values):
    return " ".join(f"{value:.6g}" for value in values)


def _box(low, high, looks="wood", name=None):
    """A box between two corners."""
    low, high = np.array(low), np.array(high)
    label = f'name="{name}" ' if name else ""
    material = f'material="{looks}"' if looks else ""
    return (
        f'<geom {label}class="table" type="box" pos="{_numbers((low + high) / 2)}" '
        f'size="{_numbers((high - low) / 2)}" {material}/>'
    )


def _slab(start, end, x_low, x_high, thickness=0.02):
    """A slanted board: its front runs from `start` to `end` in the (y, z) plane, its body lies behind that."""
    start, end = np.array(start), np.array(end)
    length = hypot(*(end - start))
    along = (end - start) / length
    centre = (start + end) / 2 + np.array([along[1], -along[0]]) * thickness / 2
    return (
        f'<geom class="table" type="box" pos="{(x_low + x_high) / 2:.6g} {_numbers(centre)}" '
        f'size="{(x_high - x_low) / 2:.6g} {length / 2:.6g} {thickness / 2:.6g}" '
        f'euler="{atan2(along[1], along[0]):.6g} 0 0" material="wood"/>'
    )


def _fixed_table():
    """What does not move. The cabinet's opening is x -0.36 to 0.16, the drawer's cavity x -0.02 to 0.38."""
    parts = [
        _box((-0.44, -0.18, 0.40), (0.44, 0.02, 0.44)),  # table top
        _box((-0.44, 0.02, 0.40), (0.44, 0.18, 0.42)),
        _box((-0.36, 0.02, 0.42), (0.16, 0.16, 0.44), "light_wood"),  # the cabinet's floor, flush with the top
        _box((-0.44, 0.16, 0.42), (0.44, 0.18, 0.648)),  # back wall
        _box((-0.44, 0.14, 0.6278), (0.44, 0.18, 0.648)),  # top shelf
        _slab((0.1285, 0.6278), (0.14, 0.6478), -0.36, 0.16),  # lintel of the opening
        _box((-0.42, -0.16, 0.30), (0.42, 0.16, 0.32), "light_wood"),  # casing of the drawer
        _box((-0.42, -0.16, 0.32), (-0.02, 0.16, 0.40), "light_wood"),
        _box((0.38, -0.16, 0.32), (0.42, 0.16, 0.40), "light_wood"),
        _box((-0.02, 0.06, 0.32), (0.38, 0.16, 0.40), "light_wood"),
        '<geom class="table" type="cylinder" pos="-0.12 -0.12 0.449" size="0.04 0.0105" material="dark"/>',
        _box((-0.2, 0.14, 0.648), (-0.04, 0.18, 0.664), None, "led"),
        '<geom name="bulb" class="table" type="capsule" fromto="0.3 0.16 0.67 0.3 0.16 0.68" size="0.022"/>',
    ]
    for x_low, x_high in ((-0.44, -0.36), (0.16, 0.44)):  # left and right of the opening the front is closed
        parts += [
            _slab((0.02, 0.44), (0.14, 0.6478), x_low, x_high),
            _box((x_low, 0.06, 0.42), (x_high, 0.16, 0.50)),
            _box((x_low, 0.10, 0.50), (x_high, 0.16, 0.57)),
        ]
    for x in (-0.44, 0.40):
        for y in (-0.18, 0.148):
            parts.append(_box((x, y, 0.0), (x + 0.04, y + 0.032, 0.40)))  # legs
    return "".join(parts)


def _fixture(name, pos, slant, axis, travel, mass, centre, inertia, joint, geoms):
    """A part of the table on a slide joint; `slant` is its frame's rotation about x."""
    return (
        f'<body name="{name}" pos="{_numbers(pos)}" euler="{slant:.12g} 0 0">'
        f'<inertial pos="{_numbers(centre)}" mass="{mass}" diaginertia="{_numbers(inertia)}"/>'
        f'<joint name="{name}" type="slide" axis="{axis}" range="0 {travel}" {joint}/>{"".join(geoms)}</body>'
    )


def _fixtures():
    """The four moving parts; they rest at 0. Dry friction of 4 N holds all but the button, which has a spring."""
    slide = _fixture(
        "slide", (-0.1, 0.075, 0.535264), SLANT, "-1 0 0", SLIDE_RANGE, 1.543, (0.14, 0, 0.0163),
        (0.009, 0.0118, 0.0187), 'frictionloss="4" damping="1"', (
            _box((0, -0.11, 0), (0.28, 0.11, 0.02), "panel"),
            _box((0.12, 0.06, 0.02), (0.16, 0.08, 0.08), "dark"),
            _box((0.12, -0.08, 0.02), (0.16, -0.06, 0.08), "dark"),
            _box((0.12, -0.08, 0.06), (0.16, 0.08, 0.08), "dark"),
        ),
    )  # fmt: skip
    drawer = _fixture(
        "drawer", (0.18, 0, 0.32), 0, "0 -1 0", DRAWER_RANGE, 4.231, (0, -0.079, 0.0266),
        (0.043, 0.076, 0.11), 'frictionloss="4" damping="1"', (
            _box((-0.2, -0.16, 0), (0.2, 0.06, 0.02), "light_wood"),
            _box((-0.2, -0.16, 0.02), (-0.18, 0.06, 0.08), "light_wood"),
            _box((0.18, -0.16, 0.02), (0.2, 0.06, 0.08), "light_wood"),
            _box((-0.18, 0.04, 0.02), (0.18, 0.06, 0.08), "light_wood"),
            _box((-0.22, -0.18, -0.02), (0.22, -0.16, 0.08), "panel"),
            _box((-0.12, -0.26, 0.02), (-0.1, -0.18, 0.06), "dark"),
            _box((0.1, -0.26, 0.02), (0.12, -0.18, 0.06), "dark"),
            _box((-0.12, -0.26, 0.02), (0.12, -0.24, 0.06), "dark"),
        ),
    )  # fmt: skip
    button = _fixture(
        "button", (-0.12, -0.12, 0.46), 0, "0 0 -1", BUTTON_RANGE, 0.154, (0, 0, 0.012),
        (1e-4, 1e-4, 1e-4), 'damping="2" armature="0.1"', (
            '<geom class="table" type="cylinder" pos="0 0 0.012" size="0.032 0.012" material="red"/>',
        ),
    )  # fmt: skip
    # Without the stiff solimpfriction the switch creeps down 9 mm/s under its own weight, with it 0.1 mm/s.
    switch = _fixture(
        "switch", SWITCH_ORIGIN, radians(150), "0 0 -1", SWITCH_RANGE, 0.239, (0, 0.04, -0.008),
        (2e-4, 4e-4, 4e-4), 'frictionloss="4" solimpfriction="0.999 0.99999 0.001" damping="1"', (
            _box((-0.06, 0, -0.024), (-0.04, 0.064, 0.008), "dark"),
            _box((0.04, 0, -0.024), (0.06, 0.064, 0.008), "dark"),
            _box((-0.06, 0.044, -0.024), (0.06, 0.064, 0.008), "dark"),
        ),
    )  # fmt: skip
    return slide + drawer + button + switch


def _blocks():
    return "".join(
        f'<body name="{name}" pos="0 0 1"><freejoint name="{name}"/>'
        f'<geom class="block" type="box" size="{half_length} 0.02 0.02" mass="1" material="{name}"/></body>'
        for name, half_length in zip(BLOCK_NAMES, BLOCK_HALF_LENGTHS, strict=True)
    )


# Per link: position and rotation about x of its frame (the public Panda description), joint range, mass, centre of
# mass, inertia, and what it collides with: capsules (from 3, to 3, radius).
LINKS = (
    ("0 0 0.333", 0, (-2.9671, 2.9671), 2.7, "0 -0.04 -0.05", "0.023 0.018 0.0115",
     ("0 0 -0.19 0 0 0 0.06", "0 -0.03 0 0 0.03 0 0.06")),
    ("0 0 0", -pi / 2, (-1.8326, 1.8326), 2.73, "0 -0.04 0.06", "0.0235 0.0116 0.018",
     ("0 0 -0.03 0 0 0.03 0.06", "0 0 0 0 -0.13 0 0.06")),
    ("0 -0.316 0", pi / 2, (-2.9671, 2.9671), 2.04, "0.01 0.01 -0.05", "0.011 0.0126 0.012",
     ("0 0 -0.13 0 0 -0.07 0.06", "0.08 0.03 0 0.08 -0.03 0 0.055")),
    ("0.0825 0 0", pi / 2, (-3.1416, 0.0), 2.08, "-0.03 0.03 0.02", "0.0113 0.0123 0.013",
     ("0 0 -0.03 0 0 0.03 0.055", "-0.08 0.09 0 -0.08 0.05 0 0.055")),
    ("-0.0825 0.384 0", -pi / 2, (-2.9671, 2.9671), 3.0, "0 0.04 -0.12", "0.0357 0.03 0.0128",
     ("0 0 -0.22 0 0.03 -0.2 0.05", "0 0.07 -0.15 0 0.08 0 0.035")),
    ("0 0 0", pi / 2, (-0.0873, 3.8223), 1.3, "0.04 0 0", "0.0034 0.005 0.006",
     ("0 0 -0.03 0 0 0 0.05", "0.09 0.02 0 0.09 -0.01 0 0.045")),
    ("0.088 0 0", pi / 2, (-2.9671, 2.9671), 0.2, "0 0 0.08", "0.0004 0.0004 0.0006",
     ("0 0 0.06 0 0 0.07 0.042",)),
)  # fmt: skip
# Looks only: a dark ring at each joint and a white tube where the capsules leave a gap, (from 3, to 3, radius) each.
LINK_RINGS = ("0 0 -0.195 0 0 -0.185 0.064", "0 0 -0.066 0 0 0.066 0.052", "0 0 -0.135 0 0 -0.125 0.064",
              "0 0 -0.062 0 0 0.062 0.048", "0 0 -0.245 0 0 -0.235 0.054", "0 0 -0.062 0 0 0.058 0.043",
              "0 0 0.052 0 0 0.058 0.046")  # fmt: skip
LINK_TUBES = (None, None, "0 0 -0.09 0.06 0 0 0.05", "0 0 0 -0.08 0.06 0 0.05", "0 0.02 -0.18 0 0.06 -0.02 0.04",
              "0 0 0 0.07 0 0 0.042", "0 0 -0.01 0 0 0.09 0.04")  # fmt: skip


def _arm(looks):
    """The Panda arm with CALVIN's longer fingers; `looks` adds geoms that are seen but touch nothing."""
    xml = ""
    for i, (pos, slant, limits, mass, centre, inertia, capsules) in enumerate(LINKS):
        xml += (
            f'<body name="link{i + 1}" pos="{pos}" euler="{slant:.12g} 0 0">'
            f'<inertial pos="{centre}" mass="{mass}" diaginertia="{inertia}"/>'
            f'<joint name="joint{i + 1}" axis="0 0 1" range="{_numbers(limits)}" armature="0.1"/>'
        )
        for capsule in capsules:
            ends, radius = capsule.rsplit(" ", 1)
            xml += f'<geom class="robot" type="capsule" fromto="{ends}" size="{radius}"/>'
        for kind, capsule, material in (("cylinder", LINK_RINGS[i], "dark"), ("capsule", LINK_TUBES[i], "shell")):
            if looks and capsule is not None:
                ends, radius = capsule.rsplit(" ", 1)
                xml += f'<geom class="looks" type="{kind}" fromto="{ends}" size="{radius}" material="{material}"/>'
    # Hand and fingers must taper as the real ones do: with single boxes the hand caught the switch now and then.
    xml += (
        f'<body name="hand" pos="0 0 0.107" euler="0 0 {-pi / 4:.12g}">'
        '<inertial pos="0 0 0.04" mass="1.01" diaginertia="0.004 0.0015 0.0035"/>'
        '<geom class="robot" type="box" pos="0 0 0.002" size="0.0295 0.102 0.028"/>'
        '<geom class="robot" type="box" pos="0 0 0.048" size="0.0205 0.1 0.018"/>'
        '<site name="tcp" pos="0 0 0.14" size="0.005" rgba="1 0 0 0"/>'
    )
    for name, side in (("left", 1), ("right", -1)):
        xml += (
            f'<body name="finger_{name}" pos="0 0 0.0584">'
            f'<inertial pos="0 {side * 0.012} 0.05" mass="0.1" diaginertia="1e-4 1e-4 2e-5"/>'
            f'<joint name="finger_{name}" type="slide" axis="0 {side} 0" range="0 {FINGER_OPEN}" armature="0.1"/>'
            f'<geom class="finger" type="box" pos="0 {side * 0.0156:.6g} 0.016" size="0.0105 0.01 0.016"/>'
            f'<geom class="finger" type="box" pos="0 {side * 0.0122:.6g} 0.048" size="0.0102 0.0075 0.016"/>'
            f'<geom class="finger" type="box" pos="0 {side * 0.0078:.6g} 0.08" size="0.009 0.0038 0.0162"/>'
            f'<geom class="finger" type="box" pos="{side * 0.0009} {side * 0.0024:.6g} 0.0832" '
            'size="0.0092 0.0015 0.0125" material="dark"/></body>'
        )
    return xml + "</body>" + "</body>" * len(LINKS)


def _xml(arm_only=False, looks=False):
    """Return the model as MJCF. `arm_only` leaves the arm alone, for the inverse kinematics."""
    # Collision bits: 1 table and floor, 2 robot, 4 blocks. Parts of the table do not touch each other, nor do links.
    # autoreset off: MuJoCo must not put a diverged state silently back to the origin; the environments check for it.
    # The solver keeps its default limits: with fewer line searches the switch's friction is not solved near its limit.
    world = '<geom name="floor" class="table" type="plane" size="3 3 0.1" material="floor"/>'
    world += _fixed_table() + _fixtures() + _blocks()
    motors = "".join(f'<motor joint="joint{i + 1}"/>' for i in range(7))
    motors += '<motor joint="finger_left"/><motor joint="finger_right"/>'
    # The button's spring: 24/s back to 0, at most 4 N.
    motors += '<general joint="button" gainprm="2400" biastype="affine" biasprm="0 -2400 -100" forcerange="-4 4"/>'
    base = """
        <geom class="looks" type="cylinder" size="0.085 0.065" pos="0 0 0.065" material="shell"/>
        <geom class="looks" type="box" size="0.13 0.1 0.02" pos="-0.03 0 0.0" material="dark"/>
        <geom class="looks" type="cylinder" size="0.11 0.12" pos="-0.02 0 -0.12" material="pedestal"/>"""
    return f"""
    <mujoco model="skimo_calvin">
      <compiler angle="radian" autolimits="true"/>
      <option timestep="{TIME_STEP:.17g}" integrator="implicitfast" gravity="0 0 -9.8">
        <flag autoreset="disable"/>
      </option>
      <default>
        <default class="table"><geom contype="1" conaffinity="6" friction="{FRICTION["table"]} 0.005 1e-4"/></default>
        <default class="robot">
          <geom contype="2" conaffinity="5" friction="{FRICTION["robot"]} 0.005 1e-4" material="shell"/>
        </default>
        <default class="finger">
          <geom contype="2" conaffinity="5" friction="{FRICTION["finger"]} 0.02 0.001" condim="4" material="metal"/>
        </default>
        <default class="block"><geom contype="4" conaffinity="7" friction="{FRICTION["block"]} 0.005 1e-4"/></default>
        <default class="looks"><geom contype="0" conaffinity="0"/></default>
      </default>
      <asset>
        <texture name="sky" type="skybox" builtin="gradient" rgb1="0.82 0.88 0.94" rgb2="0.97 0.98 1" width="64"
                 height="384"/>
        <texture name="tiles" type="2d" builtin="checker" rgb1="0.62 0.65 0.69" rgb2="0.57 0.6 0.64" width="256"
                 height="256"/>
        <texture name="grain" type="cube" builtin="flat" mark="random" random="0.03" rgb1="0.63 0.46 0.31"
                 rgb2="0.63 0.46 0.31" markrgb="0.55 0.39 0.25" width="128" height="128"/>
        <material name="floor" texture="tiles" texrepeat="8 8"/>
        <material name="wood" texture="grain" specular="0.2" shininess="0.3"/>
        <material name="light_wood" rgba="0.8 0.66 0.48 1" specular="0.2"/>
        <material name="panel" rgba="0.93 0.89 0.81 1" specular="0.3"/>
        <material name="dark" rgba="0.16 0.17 0.19 1" specular="0.4"/>
        <material name="shell" rgba="0.94 0.95 0.96 1" specular="0.6" shininess="0.7"/>
        <material name="pedestal" rgba="0.36 0.39 0.43 1"/>
        <material name="metal" rgba="0.62 0.64 0.67 1" specular="0.8" shininess="0.8"/>
        <material name="red" rgba="0.83 0.16 0.14 1" specular="0.4"/>
        <material name="blue" rgba="0.16 0.33 0.8 1" specular="0.4"/>
        <material name="pink" rgba="0.93 0.5 0.68 1" specular="0.4"/>
      </asset>
      <visual>
        <quality shadowsize="1024" offsamples="4"/>
        <headlight ambient="0.4 0.4 0.4" diffuse="0.3 0.3 0.3" specular="0.1 0.1 0.1"/>
      </visual>
      <worldbody>
        <light pos="0.4 -0.9 2.4" dir="-0.18 0.3 -1" diffuse="0.55 0.55 0.52" castshadow="true"/>
        <light pos="1.2 -0.9 1.8" dir="-0.6 0.5 -1" diffuse="0.25 0.25 0.28" castshadow="false"/>
        <body name="base" pos="-0.34 -0.46 0.24">{base if looks else ""}{_arm(looks)}</body>
        {"" if arm_only else world}
      </worldbody>
      <equality><joint joint1="finger_left" joint2="finger_right" solref="0.01 1"/></equality>
      <actuator>{"" if arm_only else motors}</actuator>
    </mujoco>"""


@cache
def scene_model() -> mujoco.MjModel:
    """Return the whole scene, as it is simulated."""
    return mujoco.MjModel.from_xml_string(_xml())


@cache
def arm_model() -> mujoco.MjModel:
    """Return the arm alone, for the inverse kinematics; it touches nothing."""
    model = mujoco.MjModel.from_xml_string(_xml(arm_only=True))
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT | mujoco.mjtDisableBit.mjDSBL_CONSTRAINT
    return model


def display_model() -> mujoco.MjModel:
    """Return a fresh copy of the scene with more to see, for pictures: its states are those of `scene_model`."""
    return mujoco.MjModel.from_xml_string(_xml(looks=True))


# ------------------------------------------------------------------------ what the port and PyBullet (if used) share

BUTTON_THRESHOLD = BUTTON_RANGE / 2  # m
SWITCH_THRESHOLD = SWITCH_RANGE / 2  # m


@cache
def _placement():
    """Return an MjData to try out places of blocks, and the blocks' bodies."""
    return mujoco.MjData(scene_model()), [scene_model().body(name).id for name in BLOCK_NAMES]


def place_blocks(rng) -> np.ndarray:
    """Draw the poses of the three blocks, (21,): on random surfaces, again until no two touch each other."""
    model, (data, bodies) = scene_model(), _placement()
    poses = np.zeros((3, 7))
    while True:
        for pose in poses:
            low, high = SURFACES[rng.integers(len(SURFACES))]
            pose[:2] = rng.uniform(low, high)
            pose[2] = BLOCK_HEIGHT
            half_yaw = rng.uniform(-np.pi, np.pi) / 2
            pose[3], pose[6] = np.cos(half_yaw), np.sin(half_yaw)
        data.qpos[BLOCKS] = poses.ravel()
        mujoco.mj_kinematics(model, data)
        mujoco.mj_collision(model, data)
        touching = np.isin(model.geom_bodyid[data.contact.geom], bodies).all(axis=1)
        if not touching.any():
            return poses.ravel()


def switch_lights(physics, chosen) -> None:
    """Let button and switch set the lights at the end of a step, of the chosen members (index or slice).

    `physics` has qpos (E, 34) and pressed, led, bulb (E,) bool. Both are looked at once per step, as in the original:
    the LED toggles when the button goes down, the bulb is on while the switch is beyond the middle.
    """
    button, switch = physics.qpos[:, FIXTURES][:, 2:].T
    pressed = button > BUTTON_THRESHOLD
    physics.led[chosen] ^= (pressed & ~physics.pressed)[chosen]
    physics.pressed[chosen] = pressed[chosen]
    physics.bulb[chosen] = (switch > SWITCH_THRESHOLD)[chosen]


def observations(physics) -> np.ndarray:
    """Return the observations (E, 21) float64 of a physics: MuJoCo's (calvin.py) or Bullet's (calvin_pybullet.py)."""
    tool = physics.tool_position, physics.tool_angles, physics.qpos[:, FINGERS].sum(axis=1, keepdims=True)
    arm = physics.qpos[:, ARM], physics.gripper[:, None]
    table = physics.qpos[:, FIXTURES], physics.bulb[:, None], physics.led[:, None]
    return np.concatenate([*tool, *arm, *table], axis=1)
