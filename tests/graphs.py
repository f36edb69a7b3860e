"""What autograd's graphs hold."""

from __future__ import annotations

from typing import Any

import torch


def saved_tensors(node: Any) -> list[torch.Tensor]:
    """All tensors that a graph holds for its backward pass, as it would get them."""
    found, seen, queue = [], set(), [node]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        queue.extend(parent for parent, _ in node.next_functions)
        for name in dir(node):
            if name.startswith("_saved_") and isinstance(value := getattr(node, name), torch.Tensor):
                found.append(value)
    return found
