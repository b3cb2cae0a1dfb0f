"""Packages that do not lie where their name says; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["softprompt", "softprompt.formats", "softprompt.tasks", "softprompt.gin"],
    package_dir={"softprompt": "softprompt", "softprompt.tasks": "tasks", "softprompt.gin": "gin"},
    package_data={
        "softprompt": ["embedded/**/*"],
        "softprompt.gin": ["**/*.gin"],
    },
)
