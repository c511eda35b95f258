"""The package's front door; the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ppow_jax*"]), "ppow_jax.configs"],
    package_dir={"ppow_jax.configs": "configs"},
)
