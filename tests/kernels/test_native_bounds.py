"""The compiled 4-bit code touches nothing beyond its buffers: driven from C, with sanitizers, between guarded pages."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from native_code import compiled

from loadstone.kernels import native

SOURCES = [*sorted(Path(native.__file__).parent.glob("*.c")), Path(__file__).with_name("native_bounds.c")]
COMPILER = shutil.which("gcc") or shutil.which("cc")
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSANITIZED")

pytestmark = [compiled, pytest.mark.skipif(COMPILER is None, reason="no C compiler")]


def build(target: Path, *flags: str, sources: list[Path] = SOURCES) -> subprocess.CompletedProcess[str]:
    command = [COMPILER, *flags, "-fopenmp", "-ffp-contract=off", f"-I{SOURCES[0].parent}", *map(str, sources)]
    return subprocess.run([*command, "-lm", "-ldl", "-o", str(target)], capture_output=True, text=True)


@pytest.mark.parametrize("flags", [("-O3",), SANITIZED], ids=["guarded pages", "sanitizers"])
def test_odd_sizes(tmp_path, flags):
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }")
    if build(tmp_path / "empty", *flags, sources=[empty]).returncode:
        pytest.skip("the compiler has no OpenMP or no sanitizers here")
    built = build(tmp_path / "bounds", *flags)
    assert built.returncode == 0, built.stderr
    found = subprocess.run([tmp_path / "bounds"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert int(found.stdout.split()[0]) > 3000 * len(native.levels())


def test_finds_what_is_planted(tmp_path):
    """A store of 64 scales where fewer are left."""
    planted = tmp_path / "avx512.c"
    source = next(path for path in SOURCES if path.name == "avx512.c").read_text()
    planted.write_text(source.replace("if (i + 64 <= room)", "if (i + 64 <= room + 64)"))
    assert planted.read_text() != source
    if native.levels()[-1] != "avx512bf16":
        pytest.skip("this processor has not the level it is planted in")
    others = [path for path in SOURCES if path.name != "avx512.c"]
    assert build(tmp_path / "bounds", "-O3", sources=[*others, planted]).returncode == 0
    assert subprocess.run([tmp_path / "bounds"], capture_output=True).returncode != 0
