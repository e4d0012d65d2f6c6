"""Pictures of MuJoCo models without a display.

Not `mujoco.Renderer`: it takes the display's OpenGL unless MUJOCO_GL was set before mujoco was first imported.
"""

import contextlib
import importlib
import os
import sys

import mujoco
import numpy as np

from data_tools.files import DataError

VARIABLES = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM")


class Painter:
    """Draws a model from its joint positions. Belongs to the thread that made it."""

    def __init__(self, model, frame_shape, lookat, distance: float, azimuth: float, elevation: float):
        """frame_shape: (height, width, 3) in pixels; the camera in metres and degrees.

        Raises DataError where OpenGL is missing.
        """
        self.model = model
        self.data = mujoco.MjData(model)
        self.frame_shape = frame_shape
        height, width, _ = frame_shape
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        # CUDA builds of torch bring Triton, which crashes Python (seen: Triton 3.7, Python 3.13) when torch imports it
        # after Mesa's software renderer; before it, it does not.
        with contextlib.suppress(ImportError):
            import triton  # noqa: F401
        # MuJoCo's own default needs a display on Linux; EGL does not.
        defaults = {"linux": "egl", "darwin": "cgl"}
        wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
        name = wanted if wanted in ("egl", "osmesa", "cgl", "glfw") else defaults.get(sys.platform, "glfw")
        said = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
        try:
            self.context = importlib.import_module(f"mujoco.{name}").GLContext(width, height)
            self.context.make_current()
            self.scene = mujoco.MjvScene(model, maxgeom=1000)
            self.target = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.target)
        except Exception as error:  # drivers and libraries raise nearly everything
            cure = "install EGL (Debian: libegl1 libgl1)" if name == "egl" else f"install what mujoco.{name} needs"
            cure += f", or unset or correct {said}" if said else ", or install libosmesa6 and set MUJOCO_GL=osmesa"
            raise DataError(f"pictures need OpenGL, {name} does not work here ({error}): {cure}.") from error
        self.camera = mujoco.MjvCamera()
        self.camera.distance = distance
        self.camera.azimuth = azimuth
        self.camera.elevation = elevation
        self.camera.lookat[:] = lookat

    def __call__(self, qpos) -> np.ndarray:
        """Return the picture (height, width, 3) uint8 of joint positions (nq,)."""
        self.data.qpos[:] = qpos
        mujoco.mj_forward(self.model, self.data)
        self.context.make_current()
        height, width, _ = self.frame_shape
        frame = np.empty(self.frame_shape, dtype=np.uint8)
        view = mujoco.MjrRect(0, 0, width, height)
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self.model, self.data, mujoco.MjvOption(), None, self.camera, everything, self.scene)
        mujoco.mjr_render(view, self.scene, self.target)
        mujoco.mjr_readPixels(frame, None, view, self.target)
        return frame[::-1].copy()  # OpenGL's rows begin at the bottom
