"""What pyproject.toml cannot say: the compiled code is a plain shared library, of a platform but of no Python.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Loaded through ctypes: no Python or torch headers. Without a compiler the torch form takes its place.
LIBRARY = Extension(
    "loadstone.kernels.native.four_bit",
    [f"kernels/native/{name}.c" for name in ("four_bit", "avx512", "avx2")],
    depends=["kernels/native/four_bit.h"],
    extra_compile_args=["-O3", "-ffp-contract=off"],
    optional=True,
)


class BuildLibrary(build_ext):
    """Names the library so that no Python takes it for a module of its own: a module's name has no dot."""

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        return "/".join((*folders, f"{name}.shared.so"))


class PlatformWheel(bdist_wheel):
    """A wheel for every Python of one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


commands: dict[str, Any] = {"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel}
setup(ext_modules=[LIBRARY], cmdclass=commands)
