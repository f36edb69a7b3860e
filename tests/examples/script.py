"""Import an example by its file, as examples are no package."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    """The module of ``examples/<name>.py``, executed once."""
    module_name = f"example_{name}"
    if module_name not in sys.modules:
        if str(EXAMPLES) not in sys.path:  # where a script finds what lies beside it
            sys.path.append(str(EXAMPLES))
        spec = spec_from_file_location(module_name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name]
