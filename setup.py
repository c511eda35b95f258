"""The package's front door; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
