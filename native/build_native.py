"""Builds millpond.native._native: setuptools' build_ext plus one generated file.

The headers are the only declaration of the Python/C boundary: the text between their
cdef markers is what cffi parses, and the same headers are what gcc compiles, so the
two cannot disagree.  MILLPOND_SANITIZE=address|undefined|thread instruments the C.
"""

import os
from pathlib import Path

from cffi import FFI
from setuptools import Extension
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
HEADERS = (
    "format.h",
    "driver.h",
    "driver_sim.h",
    "driver_test.h",
    "record.h",
    "slots.h",
    "store.h",
    "engine.h",
)


def declarations(header: str) -> str:
    """The text between the cdef markers of one header."""
    return (HERE / header).read_text().split("/* cdef: begin */")[1].split("/* cdef: end */")[0]


def make_ffi() -> FFI:
    """The boundary as cffi sees it: every header's cdef part, in order of dependence."""
    ffi = FFI()
    ffi.cdef("\n".join(declarations(header) for header in HEADERS))
    ffi.set_source("millpond.native._native", "\n".join(f'#include "{h}"' for h in HEADERS))
    return ffi


class BuildNative(build_ext):
    """Compile the C core and the generated doorway as one extension."""

    def build_extension(self, ext: Extension) -> None:
        """Add the generated file (and a sanitizer, when asked for) and compile."""
        generated = Path(self.build_temp) / "_native.c"
        generated.parent.mkdir(parents=True, exist_ok=True)
        make_ffi().emit_c_code(str(generated))
        ext.sources = [*ext.sources, str(generated)]
        if sanitizer := os.environ.get("MILLPOND_SANITIZE"):
            ext.extra_compile_args += [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer", "-O1"]
            ext.extra_link_args += [f"-fsanitize={sanitizer}"]
        super().build_extension(ext)
