"""The command: every subcommand in process, one in a process of its own, its errors and its plain and rich output."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from sparse import llama_70b, sparse_checkpoint

import loadstone
from loadstone.cli import main
from loadstone.cli.output import Output, count, sparkline


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in process: (status, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(list(arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys, loadstone.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loadstone", "--version"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"loadstone {loadstone.__version__}")


def test_list(run: Any) -> None:
    status, out, _ = run("list")
    assert status == 0
    assert all(kind in out for kind in tiny.KINDS)
    rows = json.loads(run("list", "ll*", "--json")[1])
    assert rows == [
        {"model_type": "llama", "config": "LlamaConfig", "model": "LlamaForCausalLM", "origin": "loadstone"}
    ]


def test_list_says_when_nothing_matches(run: Any) -> None:
    status, out, err = run("list", "nothing*")
    assert (status, out) == (2, "")
    assert "llama" in err


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_inspect_agrees_with_the_loaded_model(run: Any, tmp_path: Path, kind: str) -> None:
    model = tiny.checkpoint(tmp_path, kind, stored=torch.bfloat16)
    facts = json.loads(run("inspect", str(tmp_path), "--json", "--dtype", "float32")[1])
    assert facts["parameters"] == model.num_parameters()
    assert facts["model_class"] == type(model).__name__
    assert facts["plan"]["missing"] == facts["plan"]["unexpected"] == facts["plan"]["mismatched"] == []
    assert facts["plan"]["tied"] == model.active_ties()
    assert facts["checkpoint"]["bytes_by_dtype"] == {"bfloat16": 2 * model.num_parameters()}
    assert facts["plan"]["bytes_by_transform"] == {"cast": 4 * model.num_parameters()}


def test_inspect_shows_what_does_not_fit(run: Any, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    values = tiny.values("llama", num_hidden_layers=3, vocab_size=50)
    (tmp_path / "config.json").write_text(json.dumps(values))
    status, out, _ = run("inspect", str(tmp_path))
    assert status == 0
    assert "MISSING, would be initialised" in out
    assert "model.layers.2.mlp.up_proj.weight" in out
    assert "(61, 32), the model expects (50, 32)" in out


def test_inspect_plans_70b_for_devices_that_are_not_here(run: Any, tmp_path: Path) -> None:
    sparse_checkpoint(tmp_path, llama_70b(), shards=15)
    budget = ["--device-map", "sequential", "--max-memory", "0=80GB", "1=80GB"]
    facts = json.loads(run("inspect", str(tmp_path), "--json", *budget)[1])
    assert facts["parameters"] == 70_553_706_496
    assert facts["checkpoint"]["bytes_by_dtype"] == {"bfloat16": 2 * 70_553_706_496}
    assert len(facts["checkpoint"]["bytes_by_file"]) == 15
    assert set(facts["plan"]["device_map"].values()) == {0, 1}
    assert facts["plan"]["bytes_by_device"]["cuda:0"] <= 80e9
    out = run("inspect", str(tmp_path), *budget)[1]
    assert "70.6 B" in out
    assert "model.layers.{" in out
    assert len(out.splitlines()) < 50


@pytest.mark.parametrize("budget", [["0=80GB,cpu=20GB"], ["0=80GB", "cpu=20GB"], ["cuda:0=80GB, cpu=20GB"]])
def test_inspect_says_what_stays_in_the_files(run: Any, tmp_path: Path, budget: list[str]) -> None:
    sparse_checkpoint(tmp_path, llama_70b(), shards=3)
    options = ["--device-map", "auto", "--max-memory", *budget]
    plan = json.loads(run("inspect", str(tmp_path), "--json", *options)[1])["plan"]
    assert set(plan["device_map"].values()) == {0, "cpu", "disk"}
    sizes = plan["bytes_by_device"]
    assert sizes["cuda:0"] + plan["reserved_for_visitors"] <= plan["limits"]["cuda:0"] == 80 * 10**9
    assert sizes["cpu"] <= plan["limits"]["cpu"] == 20 * 10**9
    assert abs(sum(sizes.values()) - 2 * 70_553_706_496) < 4096
    assert plan["does_not_fit"] == []
    out = run("inspect", str(tmp_path), *options)[1]
    assert "left in the files" in out
    assert "DOES NOT FIT" not in out
    short = run("inspect", str(tmp_path), *options, "disk=1GB")
    assert short[0] == 0
    assert "DOES NOT FIT" in short[1]
    for one in json.loads(run("inspect", str(tmp_path), "--json", *options, "disk=1GB")[1])["plan"]["does_not_fit"]:
        assert one["needed"] > one["limit"]


def test_limits_that_make_no_sense(run: Any, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    for words in (["0=80GB,0=1GB"], ["0=lots"], ["gpu=1GB"]):
        status, _, err = run("inspect", str(tmp_path), "--device-map", "auto", "--max-memory", *words)
        assert status == 2
        assert len(err.splitlines()) == 1


def test_generate_streams_what_generate_gives(run: Any) -> None:
    arguments = ("generate", "--prompt", "In the beginning", "--max-new-tokens", "24", "--temperature", "0.8")
    status, out, err = run(*arguments)
    facts = json.loads(run(*arguments, "--json")[1])
    assert status == 0
    assert out == facts["prompt"] + facts["text"] + "\n"
    assert "tokens/s" in err
    assert facts["new_tokens"] == 24
    assert run(*arguments, "--no-echo")[1] == facts["text"] + "\n"
    assert run(*arguments, "--seed", "5")[1] != out


def test_generate_stops_at_a_text_and_takes_greedy_and_beams(run: Any) -> None:
    greedy = run("generate", "--prompt", "And the LORD", "--temperature", "0", "--max-new-tokens", "30", "--json")[1]
    text = json.loads(greedy)["text"]
    stop = text[5:8]
    out = run("generate", "--prompt", "And the LORD", "--stop", stop, "--max-new-tokens", "30", "--no-echo")[1]
    assert out.rstrip("\n").endswith(stop.rstrip("\n"))
    assert len(out) < len(text)
    beams = run("generate", "--prompt", "And the LORD", "--num-beams", "3", "--max-new-tokens", "8", "--json")[1]
    assert json.loads(beams)["new_tokens"] <= 8


def test_generate_reads_the_prompt_from_standard_input(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Café".encode())))
    assert run("generate", "--prompt", "-", "--max-new-tokens", "1")[1].startswith("Café")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    status, out, err = run("generate", "--prompt", "-")
    assert (status, out) == (2, "")
    assert "not UTF-8" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "no/such/directory/"), "no such directory"),
        (("inspect", "--dtype", "float33"), "float33"),
        (("inspect", "--device-map", "kuda"), "kuda"),
        (("inspect", "--device-map", '{"modle": 0}'), "modle"),
        (("generate", "--prompt", "x", "--top-p", "7"), "top_p"),
        (("generate", "--prompt", "x", "--attn", "eagre"), "eager"),
    ],
)
def test_bad_input_is_one_line_without_traceback(run: Any, arguments: tuple[str, ...], said: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("loadstone: error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    "arguments",
    [(), ("dance",), ("generate",), ("demo", "--steps", "0"), ("inspect", "--max-memory", "20GB"),
     ("inspect", "--device-map", "{"), ("generate", "--prompt", "x", "--seed", "-1")],
)  # fmt: skip
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code == 2


def test_traceback_on_request_and_unexpected_errors(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(loadstone.errors.NotFoundError):
        run("inspect", "no/such/directory/", "--traceback")
    monkeypatch.setattr("loadstone.cli.listing.list_architectures", lambda pattern: 1 / 0)
    status, _, err = run("list")
    assert status == 1
    assert "ZeroDivisionError" in err


def test_a_checkpoint_without_tokenizer_is_refused(run: Any, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "gpt2")
    status, _, err = run("generate", str(tmp_path), "--prompt", "x")
    assert status == 2
    assert "tokenizer.json" in err


def test_tokenizer_package_is_asked_for(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.checkpoint(tmp_path, "llama")
    (tmp_path / "tokenizer.json").write_text("{}")
    status, _, err = run("generate", str(tmp_path), "--prompt", "x")
    assert status == 2
    assert "is not a tokenizer" in err
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    status, _, err = run("generate", str(tmp_path), "--prompt", "x")
    assert status == 2
    assert "pip install 'loadstone[text]'" in err


def test_demo(run: Any, tmp_path: Path) -> None:
    status, out, _ = run("demo", "--steps", "3", "--keep", str(tmp_path / "kept"))
    assert status == 0
    assert "equal bit for bit: yes" in out
    assert "is unchanged: yes" in out
    assert json.loads(run("inspect", str(tmp_path / "kept"), "--json")[1])["plan"]["missing"] == []


def test_demo_as_json_learns_and_leaves_nothing(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    threads = torch.get_num_threads()
    facts = json.loads(run("demo", "--steps", "4", "--json")[1])
    assert facts["losses"][-1] < facts["losses"][0] - 0.2
    assert facts["before"] != facts["after"]
    assert facts["reloaded_bit_for_bit"] is True
    assert facts["embedded_model_untouched"] is True
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads


def test_rich_on_a_terminal_plain_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = _everything(Output(io.StringIO()), rich=True)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    plain = _everything(Output(io.StringIO()), rich=False)
    for text in (coloured, plain):
        assert "A [bold]heading[/bold]" in text
        assert "value" in text
        assert "\x1b[31m" not in text
    assert "\x1b[1;36m" in coloured
    assert "\x1b[1" not in plain


def _everything(output: Output, rich: bool) -> str:
    assert output.rich == rich
    output.heading("A [bold]heading[/bold]")
    output.fields([("label", "value")])
    output.table(["one", "two"], [["1", "2"]])
    output.progress("half\x1b[31m", last=True)
    return output.stream.getvalue()  # type: ignore[attr-defined]


def test_terminals_get_no_control_characters_from_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal = Output(io.StringIO())
    terminal.write("a\x1b]0;title\x07b\n\tc")
    assert terminal.stream.getvalue() == "a\ufffd]0;title\ufffdb\n\tc"  # type: ignore[attr-defined]
    monkeypatch.delenv("FORCE_COLOR")
    piped = Output(io.StringIO())
    piped.write("a\x1bb")
    assert piped.stream.getvalue() == "a\x1bb"  # type: ignore[attr-defined]


def test_small_displays() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert len(sparkline([float(i) for i in range(1000)], width=40)) == 40
    assert [count(n) for n in (7, 1500, 1_179_360, 70_553_706_496)] == ["7", "1.5 k", "1.18 M", "70.6 B"]


# tune and bench


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tune_without_a_gpu_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "LOADSTONE_CACHE": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "loadstone", "tune"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("loadstone: error: block sizes are tuned on the GPU")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CPU and Triton's interpreter count as a GPU, on which fewer warps are faster."""
    from loadstone.kernels import search, tuning

    def timer(call: Any) -> float:
        call()
        sizes = tuning._tried["rotary", "any"]
        return 1.0 + sizes["num_warps"] + (sizes["BLOCK"] != 256)

    def forget() -> None:
        tuning.tuned_table.cache_clear()
        tuning._blocks.cache_clear()

    monkeypatch.setenv("LOADSTONE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_device_name", lambda kind, index: "Test GPU")
    monkeypatch.setattr(search, "gpu_to_tune", lambda index: torch.device("cpu"))
    monkeypatch.setattr(search, "gpu_timer", lambda device: timer)
    monkeypatch.setitem(tuning.shipped_table("interpreter")["rotary"], "any", {"BLOCK": 256, "num_warps": 2})
    forget()
    yield tuning.tuned_path("Test GPU")
    forget()


@pytest.mark.skipif(torch.cuda.is_available(), reason="drives the search through Triton's interpreter")
def test_tune_prints_and_keeps_what_it_finds(run: Any, gpu: Path) -> None:
    status, out, _ = run("tune", "--kernel", "rotary", "--dry-run")
    assert status == 0
    assert "nothing is kept" in out
    assert not gpu.exists()
    status, out, _ = run("tune", "--kernel", "rotary", "--quick")
    assert status == 0
    assert "BLOCK=256 num_warps=2" in out
    assert "BLOCK=256 num_warps=1" in out
    assert "1.50 times as fast" in out
    assert f"1 of 1 faster, kept in {gpu}" in out
    assert json.loads(gpu.read_text())["kernels"] == {"rotary": {"any": {"BLOCK": 256, "num_warps": 1}}}
    facts = json.loads(run("tune", "--kernel", "rotary", "--json")[1])
    assert facts["kept_in"] == str(gpu)
    assert [result["improved"] for result in facts["results"]] == [False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="drives the search through Triton's interpreter")
def test_tune_says_what_it_does_not_know(run: Any, gpu: Path) -> None:
    status, _, err = run("tune", "--kernel", "rotery")
    assert status == 2
    assert "did you mean 'rotary'" in err
    assert run("tune", "--kernel", "rotary", "--shape-class", "d64-16")[0] == 2
    gpu.parent.mkdir(parents=True)
    gpu.write_text("{")
    status, _, err = run("tune", "--kernel", "rotary")
    assert status == 2
    assert str(gpu) in err


def test_every_benchmark_of_the_command_is_a_script() -> None:
    from loadstone.cli.main import BENCHMARKS

    folder = Path(__file__).parents[1] / "benchmarks"
    there = {file.stem.replace("_", "-") for file in folder.glob("*.py") if "harness.main(" in file.read_text()}
    assert set(BENCHMARKS) == there - {"harness"}


def test_bench_runs_from_the_checkout_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "first-call", "--help"]) == 0
    assert "python -m benchmarks.first_call" in capfd.readouterr().out
    assert main(["bench", "first-call", "--rounds", "many"]) == 2
    assert "invalid int value" in capfd.readouterr().err
    monkeypatch.setattr("loadstone.cli.bench.ROOT", tmp_path)
    assert main(["bench", "attention", "--quick"]) == 2
    assert "python -m benchmarks.attention" in capfd.readouterr().err
