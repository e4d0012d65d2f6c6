"""Where a number comes from: command, code and machine."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def describe_code(root: Path) -> dict:
    """Commit of a checkout and whether its files were changed since; commit None where there is no checkout."""

    def git(*command):
        try:
            result = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True)
        except OSError:  # git is not installed
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    return dict(commit=git("rev-parse", "HEAD"), changed=bool(git("status", "--porcelain", "--untracked-files=no")))


def describe_machine() -> str:
    """Processor, cores, GPUs and Python of this machine in one line."""
    try:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        cpu = platform.processor() or platform.machine()
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
    except OSError:
        gpus = []
    gpus = [gpu.strip() for gpu in gpus if gpu.strip()] or ["no GPU"]
    return f"{cpu}, {os.cpu_count()} cores, {', '.join(gpus)}, Python {platform.python_version()}, {platform.system()}"


def provenance() -> dict:
    """Command, commit, whether files were changed since, and machine: for the JSON beside a log. Ask at the start."""
    command = " ".join(["python", *sys.argv])
    return dict(command=command, **describe_code(ROOT), machine=describe_machine())
