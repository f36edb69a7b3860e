"""``loadstone generate``: continue a prompt."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from ..errors import ArgumentError, GenerationError, RemoteCodeError
from ..models.causal_lm import CausalLM
from ..models.tokenizer import TextStream, load_tokenizer
from ..registry import AutoModelForCausalLM
from .output import Output, print_json
from .place import hub_options, memory_of, source_of

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def run(arguments: argparse.Namespace) -> None:
    """Load, generate, and print the text as it comes."""
    options = _options(arguments)
    prompt = _prompt(arguments.prompt)
    source = source_of(arguments)
    tokenizer = load_tokenizer(source)
    ids = tokenizer.encode(prompt)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
        max_memory=memory_of(arguments),
        variant=arguments.variant,
        attn_implementation=arguments.attn,
        kernels=arguments.kernels,
        trust_remote_code=arguments.trust_remote_code,
        code_revision=arguments.code_revision,
        **hub_options(arguments),
    )
    if not isinstance(model, CausalLM):
        raise RemoteCodeError(
            f"{type(model).__name__} does not derive from loadstone.CausalLM, whose generation this command drives"
        )
    if not ids:  # an empty prompt and a tokenizer that puts nothing before it
        begin = model.generation_config.bos_token_id
        if begin is None:
            raise GenerationError("the prompt is empty and the model names no token to begin with; give a prompt")
        ids = [begin]
    show = _Printer(Output(), TextStream(tokenizer, ids), "" if arguments.no_echo else prompt, quiet=arguments.json)
    started = time.perf_counter()
    with torch.inference_mode():
        rows = model.generate(
            torch.tensor([ids], device=model.device),
            generator=torch.Generator(model.device).manual_seed(arguments.seed),
            tokenizer=tokenizer,
            streamer=None if options.get("num_beams", 1) > 1 else show,
            **options,
        )
    seconds = time.perf_counter() - started
    new = rows[0, len(ids) :].tolist()
    if options.get("num_beams", 1) > 1:
        show.text(tokenizer.decode(new))
    show.end()
    speed = len(new) / seconds
    if arguments.json:
        print_json({"prompt": prompt, "text": tokenizer.decode(new), "prompt_tokens": len(ids), "new_tokens": len(new),
                    "seconds": seconds, "tokens_per_second": speed, "load": model.load_report.to_dict()})  # fmt: skip
    else:
        note = f"{len(new)} tokens in {seconds:.2f} s, {speed:.1f} tokens/s; {_first_line(model)}"
        Output(sys.stderr).line(note, "dim")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `CausalLM.generate`; what is not given is left to the checkpoint's generation_config.json."""
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    for name in (*_SAMPLING, "repetition_penalty", "num_beams"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    if arguments.stop:
        options["stop_strings"] = arguments.stop
    if options.get("temperature") == 0:
        for name in _SAMPLING:
            options.pop(name, None)
        options["do_sample"] = False
    elif any(name in options for name in _SAMPLING):
        options["do_sample"] = True
    return options


def _prompt(given: str) -> str:
    if given != "-":
        return given
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"the prompt on standard input is not UTF-8: {error}") from error


def _first_line(model: Any) -> str:
    return str(model.load_report).splitlines()[0]


class _Printer:
    """Given each step's tokens, prints the text that they complete, the prompt before the first of it."""

    def __init__(self, output: Output, stream: TextStream, prompt: str, quiet: bool) -> None:
        self._output, self._stream, self._prompt, self._quiet = output, stream, prompt, quiet

    def __call__(self, tokens: torch.Tensor) -> None:
        self.text(self._stream.put(int(tokens[0])))

    def text(self, text: str) -> None:
        if self._quiet:
            return
        if self._prompt:
            self._output.write(self._prompt, "dim")
            self._prompt = ""
        if text:
            self._output.write(text)

    def end(self) -> None:
        self.text(self._stream.end())
        self.text("\n")
