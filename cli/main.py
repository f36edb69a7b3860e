"""The arguments of the command, and what becomes of its errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import LoadstoneError
from .arguments import device_map, memory, number, positive

# Command -> the module that runs it, imported only then.
_COMMANDS = {
    "demo": ".demo", "inspect": ".inspect", "generate": ".generate", "list": ".listing", "tune": ".tune",
    "bench": ".bench", "quantize": ".quantize", "convert": ".convert",
}  # fmt: skip
BENCHMARKS = (
    "attention",
    "ops",
    "training-step",
    "first-call",
    "quantization",
    "qlora",
    "finetune",
    "scaling",
    "forward",
    "loading",
    "loading-paths",
    "imports",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 (unexpected error), 2 (bad input), 130 (interrupted),
    or that of a benchmark."""
    arguments = parser().parse_args(argv)
    try:
        status = import_module(_COMMANDS[arguments.command], __package__).run(arguments)
        sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt:
        print("loadstone: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader had enough (head, less); what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LoadstoneError as error:
        if arguments.traceback:
            raise
        print(f"loadstone: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if arguments.traceback:
            raise
        print(
            f"loadstone: unexpected {type(error).__name__}: {_one_line(error)} (--traceback shows where)",
            file=sys.stderr,
        )
        return 1


def _one_line(error: Exception) -> str:
    """The message without line breaks or control characters: file names and tensor names may hold anything."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from .. import __version__

    top = argparse.ArgumentParser(
        prog="loadstone", description="Causal language models by name: look at checkpoints, generate text, see a demo."
    )
    top.add_argument("--version", action="version", version=f"loadstone {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar=" | ".join(_COMMANDS))
    errors = argparse.ArgumentParser(add_help=False)
    errors.add_argument("--traceback", action="store_true", help="on errors show where they were raised")
    common = argparse.ArgumentParser(add_help=False, parents=[errors])
    common.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    _demo(
        commands.add_parser("demo", parents=[common], help="load, generate, fine-tune, save and reload a small model")
    )
    _inspect(
        commands.add_parser("inspect", parents=[common], help="what a checkpoint holds and how it would be loaded")
    )
    _generate(commands.add_parser("generate", parents=[common], help="continue a prompt"))
    _list(commands.add_parser("list", parents=[common], help="the architectures that can be loaded"))
    _quantize(commands.add_parser("quantize", parents=[common], help="make a quantized checkpoint of another"))
    _convert(commands.add_parser("convert", parents=[common], help="make safetensors of pickles, GGUF or safetensors"))
    _tune(commands.add_parser("tune", parents=[common], help="search block sizes for this machine's GPU"))
    _bench(commands.add_parser("bench", parents=[errors], help="run a benchmark of the repository"))
    return top


def _demo(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Load the embedded model, generate, fine-tune on a few lines, save and reload; under a minute."
    )
    command.add_argument("--steps", type=positive, default=40, help="training steps (default %(default)s)")
    command.add_argument("--seed", type=number, default=0, help="of the sampling (default %(default)s)")
    command.add_argument("--keep", metavar="DIR", help="save the fine-tuned model there instead of a temporary place")


def _place(command: argparse.ArgumentParser) -> None:
    """The options that say where a model comes from, and where it goes."""
    command.add_argument(
        "name", nargs="?", metavar="NAME", help="a directory or a Hub repository id (default: the embedded model)"
    )
    command.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    command.add_argument("--subfolder", default="", help="folder of the checkpoint inside NAME")
    command.add_argument("--variant", help="as in model.VARIANT.safetensors")
    _hub(command)
    command.add_argument("--dtype", help="float32, bfloat16, ... (default: what config.json says)")
    command.add_argument(
        "--device-map",
        type=device_map,
        metavar="MAP",
        help="a device, auto, balanced, balanced_low_0, sequential, disk, or a JSON object",
    )
    command.add_argument(
        "--max-memory",
        type=memory,
        nargs="+",
        metavar="DEVICE=SIZE",
        help="for --device-map, as in 0=20GiB,cpu=60GiB or as several words",
    )


def _hub(command: argparse.ArgumentParser) -> None:
    """The options that say how the Hub is reached, and let a repository's own code run."""
    command.add_argument("--cache-dir", metavar="DIR", help="cache of Hub repositories")
    command.add_argument("--local-files-only", action="store_true", help="use the cache, do not reach for the Hub")
    command.add_argument("--trust-remote-code", action="store_true", help="run the repository's own code, if any")
    command.add_argument("--code-revision", metavar="REV", help="branch, tag or commit of that code")


def _inspect(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Read the headers of a checkpoint, no weights: architecture, parameters, memory, and the plan of a load. "
        "Devices in the map need not be on this machine."
    )
    _place(command)
    command.add_argument("--quantize", choices=("nf4", "fp4", "int8"), help="plan a load that quantizes")
    command.add_argument("--gguf-file", metavar="FILE", help="the GGUF file in NAME to look at; NAME itself may be one")
    command.add_argument("--pickled", action="store_true", help="look at pytorch_model.bin; nothing in it is run")


def _generate(command: argparse.ArgumentParser) -> None:
    command.description = "Continue a prompt, streaming the text; sampling if a sampling option is given."
    _place(command)
    command.add_argument("--prompt", required=True, help="the text to continue; - reads it from standard input")
    command.add_argument("--max-new-tokens", type=positive, default=200, help="default %(default)s")
    command.add_argument("--temperature", type=float, help="0 is greedy")
    command.add_argument("--top-k", type=number)
    command.add_argument("--top-p", type=float)
    command.add_argument("--min-p", type=float)
    command.add_argument("--repetition-penalty", type=float)
    command.add_argument("--num-beams", type=positive, help="beam search; the text comes at the end")
    command.add_argument("--stop", action="append", metavar="TEXT", help="end after this text (can be repeated)")
    command.add_argument("--seed", type=number, default=0, help="of the sampling (default %(default)s)")
    command.add_argument("--no-echo", action="store_true", help="do not print the prompt before its continuation")
    command.add_argument("--attn", metavar="NAME", help="attention: sdpa (default), eager, flash_attention_2")
    command.add_argument("--kernels", metavar="NAME", default="auto", help="of other operations: auto, torch, triton")


def _list(command: argparse.ArgumentParser) -> None:
    command.description = "The registered architectures, plug-ins of installed packages included."
    command.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="a shell pattern, as in 'qwen*'")


def _quantize(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Write the checkpoint SRC quantized to the directory DST, tensor by tensor: no model is built, and memory is "
        "needed for one tensor. Tokenizer files are copied. An existing checkpoint in DST is replaced in one step."
    )
    command.add_argument("source", metavar="SRC", help="a directory or a Hub repository id")
    command.add_argument("target", metavar="DST", help="a directory, new, empty, or of a checkpoint to be replaced")
    methods = command.add_mutually_exclusive_group(required=True)
    for name, what in (
        ("nf4", "4 bits, as bitsandbytes holds them, by quantiles of the normal distribution"),
        ("fp4", "4 bits, as bitsandbytes holds them, floating point"),
        ("int8", "8 bits, as bitsandbytes holds them (LLM.int8())"),
        ("weight-only-int8", "8 bits, for torch's own products"),
        ("weight-only-int4", "4 bits, for torch's own products"),
    ):
        methods.add_argument(f"--{name}", dest="method", action="store_const", const=name, help=what)
    command.add_argument("--double-quant", action="store_true", help="quantize the scales too (nf4, fp4)")
    command.add_argument(
        "--blocksize", type=number, choices=[32 << power for power in range(8)],
        help="numbers that share a scale (nf4, fp4; default 64)"
    )  # fmt: skip
    command.add_argument("--group-size", type=number, help="inputs that share a scale (weight-only-int4; default 128)")
    command.add_argument("--compute-dtype", help="dtype of products, kept in config.json (nf4, fp4; default float32)")
    command.add_argument("--storage", help="dtype under which the codes are held (nf4, fp4; default uint8)")
    command.add_argument("--skip", nargs="+", metavar="NAME", help="modules to leave as they are (default: the head)")
    command.add_argument("--dtype", help="of what is not quantized (default: what config.json says)")
    command.add_argument("--max-shard-size", default="50GB", metavar="SIZE", help="default %(default)s")
    command.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    command.add_argument("--variant", help="as in model.VARIANT.safetensors, of SRC")
    _hub(command)


def _convert(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Write the checkpoint SRC as safetensors to the directory DST: pytorch_model.bin (read without running what "
        "is in it), GGUF, or safetensors in another dtype or in shards of another size. Tensor by tensor: no model is "
        "built, and memory is needed for one tensor. Configuration and tokenizer files come along. An existing "
        "checkpoint in DST is replaced in one step."
    )
    command.add_argument("source", metavar="SRC", help="a directory, a GGUF file, or a Hub repository id")
    command.add_argument("target", metavar="DST", help="a directory, new, empty, or of a checkpoint to be replaced")
    command.add_argument("--dtype", help="of all weights (default: each as it is; float32 for GGUF's blocks)")
    command.add_argument("--max-shard-size", default="50GB", metavar="SIZE", help="default %(default)s")
    command.add_argument("--gguf-file", metavar="NAME", help="the GGUF file in SRC to read")
    command.add_argument("--pickled", action="store_true", help="read pytorch_model.bin though there are safetensors")
    command.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    command.add_argument("--subfolder", default="", help="folder of the checkpoint inside SRC")
    command.add_argument("--variant", help="as in model.VARIANT.safetensors, of SRC")
    _hub(command)


def _tune(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Time the kernels on this machine's GPU with other block sizes than the table's, and keep what is faster, for "
        "this kind of GPU, in $LOADSTONE_CACHE (default ~/.cache/loadstone). Interrupted, it keeps what is complete."
    )
    command.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="these kernels (default: all)")
    command.add_argument(
        "--shape-class", nargs="+", default=[], metavar="CLASS", help="as in d128-16; all (default: the common ones)"
    )
    command.add_argument("--device", type=number, metavar="N", help="the GPU of this number (default: the current one)")
    command.add_argument("--quick", action="store_true", help="try only sizes next to those in use")
    command.add_argument("--dry-run", action="store_true", help="search and print, keep nothing")


def _bench(command: argparse.ArgumentParser) -> None:
    command.description = "Run a benchmark of the checkout this package comes from; results in benchmarks/results."
    command.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    command.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="...", help="options of the benchmark, as in --quick"
    )
