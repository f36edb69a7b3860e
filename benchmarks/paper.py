"""What a training step on many GPUs costs on paper: bytes between GPUs and their time, for each way of spreading.

Nothing here is measured. Assumptions and their sources are in docs/scaling.md; a test holds its table to this model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Model(NamedTuple):
    """Sizes of a Llama, of which ``parameters`` multiply."""

    name: str
    parameters: float
    layers: int
    width: int


@dataclass(frozen=True)
class Machine:
    """A cluster: operations a second that a GPU reaches in training, bytes a second that it sends to GPUs of its node
    and, by a port of its own, beyond; seconds that a step of a ring takes, within a node and beyond; bytes of a GPU."""

    flops: float = 989e12 * 0.5
    within: float = 360e9
    beyond: float = 45e9
    hop_within: float = 3.4e-6
    hop_beyond: float = 9.6e-6
    node: int = 8
    memory: float = 80e9


class Way(NamedTuple):
    """How ranks are used: ``tp`` share each layer, ``pp`` stages share the layers, the others shard weights (FSDP), or
    with ``hybrid`` those of one node, and average gradients between nodes."""

    name: str
    tp: int = 1
    pp: int = 1
    hybrid: bool = False


MODELS = (Model("7B", 6.6e9, 32, 4096), Model("70B", 68.5e9, 80, 8192))
WAYS = (
    Way("fsdp"),
    Way("replicate, fsdp in the node", hybrid=True),
    Way("fsdp, tp 8", tp=8),
    Way("pp 8, fsdp", pp=8),
    Way("pp 8, fsdp, tp 8", tp=8, pp=8),
)
TOKENS, TEXT = 4096, 4096  # of a step for each GPU, of one microbatch
_STATES = 16  # bytes a parameter: weight, gradient and two averages of AdamW in fp32


def fsdp_bytes(parameters: float, ranks: int, gathers: int = 2, itemsize: int = 2, reduced: int = 4) -> float:
    """Bytes that a rank sends in a step: weights gathered forward and backward, gradients reduced, each by a ring."""
    return parameters * (gathers * itemsize + reduced) * (ranks - 1) / ranks


def replica_bytes(parameters: float, ranks: int, reduced: int = 4) -> float:
    """Bytes that a rank sends to sum gradients with ``ranks`` replicas by a ring, which sends all of them twice."""
    return 2 * parameters * reduced * (ranks - 1) / ranks


def tensor_bytes(model: Model, tokens: float, ranks: int, itemsize: int = 2) -> float:
    """Bytes that a rank sends in a step: two sums of activations a layer, forward and backward, one for the embedding
    and one for the head; a ring sends each twice."""
    return _sums(model) * tokens * model.width * itemsize * 2 * (ranks - 1) / ranks


def stage_bytes(model: Model, tokens: float, itemsize: int = 2) -> float:
    """Bytes that a rank of an inner stage sends in a step: activations forward, their gradients backward."""
    return 2 * tokens * model.width * itemsize


def ring_seconds(machine: Machine, ranks: int, in_node: int) -> float:
    """Latency of one gathering, or of half a sum, by a ring of ``ranks``, of which ``in_node`` share a node."""
    between = -(-ranks // in_node) - 1
    return (ranks - 1 - between) * machine.hop_within + between * machine.hop_beyond


def ring_speed(machine: Machine, ranks: int, in_node: int) -> float:
    """Bytes a second that a rank sends around a ring: beyond a node as many ports work as the ring has ranks in it."""
    return machine.within if ranks <= in_node else min(machine.within, in_node * machine.beyond)


def step(
    model: Model, machine: Machine, ranks: int, way: Way, tokens: float = TOKENS, text: float = TEXT
) -> dict[str, float]:
    """Seconds and bytes of one step in which every GPU computes as much as ``tokens`` tokens need.

    FSDP's traffic, that of replicas and that between stages can hide behind computing; sums of tensor parallelism
    cannot, nor can the time in which a pipeline fills and empties.
    """
    sharers = ranks // (way.tp * way.pp)
    in_node = max(1, machine.node // way.tp)
    shards = min(in_node, sharers) if way.hybrid else sharers
    own, layers = model.parameters / (way.tp * way.pp), model.layers / way.pp
    batch = tokens * way.tp * way.pp  # of one replica
    texts = batch / text
    gathers = 1 if way.pp > 1 else 2  # weights of a stage are kept from the first microbatch to the last
    sent = fsdp_bytes(own, shards, gathers)
    hidden = sent / ring_speed(machine, shards, in_node)
    hidden += (gathers + 1) * (layers + 1) * ring_seconds(machine, shards, in_node)
    if way.hybrid and sharers > shards:
        averaged = replica_bytes(own / shards, sharers // shards)
        sent += averaged
        hidden += averaged / machine.beyond + 2 * (layers + 1) * ring_seconds(machine, sharers // shards, 1)
    found = {"states": _STATES * own / shards, "fsdp_bytes": sent, "fsdp": hidden}
    found["compute"] = 6 * model.parameters * tokens / machine.flops
    found["tp_bytes"] = tensor_bytes(model, batch, way.tp) / way.pp
    messages = _sums(model) / way.pp * (texts if way.pp > 1 else 1)
    found["tp"] = found["tp_bytes"] / machine.within + messages * 2 * ring_seconds(machine, way.tp, machine.node)
    found["pp_bytes"] = stage_bytes(model, batch) if way.pp > 1 else 0.0
    found["pp"] = found["pp_bytes"] / (machine.beyond if ranks > machine.node else machine.within)
    found["empty"] = (found["compute"] + found["tp"]) * (way.pp - 1) / texts
    found["step"] = max(found["compute"], found["fsdp"] + found["pp"]) + found["tp"] + found["empty"]
    return found


def table(tokens: int = TOKENS) -> str:
    """The model's figures: bytes that a GPU sends, their time, and what share of a step computes."""
    machine = Machine()
    columns = ["model", "GPUs", "spread by", "states", "sent by fsdp", "by tp", "by pp", "computing", "fsdp and pp"]
    columns += ["tp", "empty", "computing of a step"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for model in MODELS:
        for ranks in (8, 64, 1024):
            for way in WAYS:
                if way.tp * way.pp > ranks or (way.hybrid and ranks <= machine.node):
                    continue
                found = step(model, machine, ranks, way, tokens)
                if found["states"] > machine.memory:
                    continue
                sent = ("states", "fsdp_bytes", "tp_bytes", "pp_bytes")
                times = found["compute"], found["fsdp"] + found["pp"], found["tp"], found["empty"]
                cells = [model.name, str(ranks), way.name, *(f"{found[name] / 1e9:.1f} GB" for name in sent)]
                cells += [*(f"{time * 1e3:.0f} ms" for time in times), f"{found['compute'] / found['step']:.0%}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _sums(model: Model) -> int:
    return 4 * model.layers + 2
