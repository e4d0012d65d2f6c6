"""Videos of episodes."""

import math
import sys
import zlib
from pathlib import Path

import gymnasium
import numpy as np
from tqdm import tqdm

from data_tools.files import DataError, check_writable, write_atomically
from data_tools.tasks.vector import MemberVectorEnv


class VideoRecorder(gymnasium.vector.VectorWrapper):
    """Records the first member's pictures in real time, at most 50 per second; written when closed."""

    def __init__(self, envs: MemberVectorEnv, path):
        """Raises an error where there will be no video: no ffmpeg, no OpenGL, no place to write."""
        import imageio_ffmpeg  # for videos only

        super().__init__(envs)
        self.path = Path(path)
        check_writable(self.path)
        imageio_ffmpeg.get_ffmpeg_version()
        self.frames = []  # compressed: those of a long episode would take gigabytes
        self.steps, self.returns = envs.steps, envs.returns  # the same arrays
        self.every = math.ceil(self.metadata["render_fps"] / 50)  # steps per picture
        self.bar = None

    def reset(self, **kwargs):
        result = super().reset(**kwargs)
        if self.bar is None:
            self.env.draw(0)  # raises here, not after an episode
            steps = self.env.max_episode_steps
            self.bar = tqdm(desc="episodes, at most", total=steps, unit="step")  # drawing takes minutes
        return result

    def step(self, actions):
        shown = not self.env.waiting[0] and self.steps[0] % self.every == 0
        result = self.env.step(actions)
        if shown:
            frame = self.env.draw(0)
            self.shape = frame.shape
            self.frames.append(zlib.compress(frame.tobytes(), 1))  # fast
        self.bar.update()
        return result

    def close(self, **kwargs):
        if self.frames:
            self.bar.close()
            try:
                write_atomically(self.path, self._write)
                print(f"video: {self.path}", flush=True)
            except DataError as error:  # no picture costs results
                print(error, file=sys.stderr, flush=True)
            self.frames = []
        return super().close(**kwargs)

    def _write(self, part):
        """Write the pictures one by one into the video file `part`."""
        import imageio.v2 as imageio  # ffmpeg is started only for videos

        fps = self.metadata["render_fps"] / self.every
        even = [(0, size % 2) for size in self.shape[:2]] + [(0, 0)]  # what the video format can hold
        with imageio.get_writer(part, fps=fps, macro_block_size=1) as writer:
            for frame in self.frames:
                picture = np.frombuffer(zlib.decompress(frame), np.uint8).reshape(self.shape)
                writer.append_data(np.pad(picture, even, mode="edge"))
