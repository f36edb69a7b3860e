"""The classes that docs/remote_code.md shows are a repository that loads."""

from __future__ import annotations

import re
from pathlib import Path

import remote_code

from loadstone import AutoModelForCausalLM

TEXT = (Path(__file__).parents[2] / "docs" / "remote_code.md").read_text(encoding="utf-8")


def test_the_documented_repository_loads_and_is_saved(tmp_path: Path) -> None:
    code = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", TEXT, re.DOTALL))
    assert set(code) == {"configuration_tiny.py", "modeling_tiny.py"}
    (auto_map,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    for reference in remote_code.AUTO_MAP.values():
        assert f'"{reference}"' in auto_map
    place = remote_code.write(tmp_path / "documented", code=code)
    for example in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        if "own-code" in example:
            names: dict[str, object] = {}
            exec(example.replace("org/own-code", str(place)), names)
            assert type(names["model"]).__name__ == "TinyForCausalLM"
    AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == set(code)
