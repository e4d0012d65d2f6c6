"""Where a number comes from: command, code and machine."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def describe_code() -> dict:
    """Commit of this checkout and whether its code is another now; commit None where there is no checkout."""

    def git(*command):
        try:
            result = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
        except OSError:  # git is not installed
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    new = git("status", "--porcelain", "algos", "data_tools")  # files that no commit holds
    return dict(commit=git("rev-parse", "HEAD"), changed=bool(changed or new))


def processor() -> str:
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not on Linux
        return platform.processor() or platform.machine()


def describe_machine() -> str:
    """Processor, cores, GPUs and Python of this machine in one line."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # no such program, or no driver
        gpus = []
    gpus = ", ".join(gpus) or "no GPU"
    return f"{processor()}, {os.cpu_count()} cores, {gpus}, Python {platform.python_version()}, {platform.system()}"


def provenance() -> dict:
    """Command, commit, whether files were changed since, and machine: for the JSON beside a log. Ask at the start."""
    command = " ".join(["python", *sys.argv])
    return dict(command=command, **describe_code(), machine=describe_machine())
