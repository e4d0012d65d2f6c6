"""Offline data that are made here, by scripts that act in the environments of data_tools.tasks."""
