"""Whether a configuration's depth can be that of the weights, known before a module is built."""

from __future__ import annotations

import re

from ..errors import ConfigError
from ..loading.checkpoint import Checkpoint
from .configuration import PreTrainedConfig

_ALWAYS = 128  # layers that cost next to nothing on meta, so that layers which share weights need no numbers
_NUMBER = re.compile(r"\d+")


def check_depth(config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """ConfigError if ``num_hidden_layers`` is over 128 and over the count of different numbers in tensors' names.

    Every layer's weights have its number in their names. A model of a hundred thousand layers takes minutes and
    gigabytes to build, even on meta, only to find that its weights are not there.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= _ALWAYS:
        return
    numbers = {number for name in checkpoint.entries for number in _NUMBER.findall(name)}
    if layers > len(numbers):
        raise ConfigError(
            f"{checkpoint.name}: the configuration says num_hidden_layers={layers}, the names of the "
            f"{len(checkpoint.entries)} tensors in its files number {len(numbers)} layers at most; "
            "take config.json and weights from one checkpoint"
        )
