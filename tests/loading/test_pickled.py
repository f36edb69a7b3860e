"""pytorch_model.bin on request: what torch.load reads of it, and nothing of what it asks to run."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peak_memory
import pytest
import tiny
import torch
import toy
from damage import damaged
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loadstone import AutoModelForCausalLM
from loadstone.errors import (
    CheckpointError,
    FormatError,
    IntegrityError,
    MissingWeightsError,
    NotFoundError,
    PathError,
    UnsafeFormatError,
)
from loadstone.loading.files import Files
from loadstone.loading.pickled import read_pickled

FORMATS = {"zip": True, "older": False}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)


def save(value: Any, path: Path, zipped: bool = True, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def values_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, as the pieces that loading reads say."""
    from loadstone.loading.checkpoint import Checkpoint

    checkpoint = Checkpoint.from_headers("x", [read_pickled(path)])
    files = Files(checkpoint)
    found = {}
    for name, entry in checkpoint.entries.items():
        count = entry.nbytes // entry.dtype.itemsize
        parts = [files.flat(entry, at, min(at + 7, count)) for at in range(0, count, 7)]
        found[name] = torch.cat([torch.empty(0, dtype=entry.dtype), *parts]).view(entry.shape)
    return found


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert mine[name].shape == tensor.shape, name
        assert torch.equal(octets(mine[name]), octets(tensor)), name


def octets(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors as they come out of models: whole, shared, sliced, transposed, expanded, empty, parameters."""
    found: dict[str, torch.Tensor] = OrderedDict()
    for number in range(draw(st.integers(0, 5))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        tensor = torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)
        kind = draw(st.sampled_from(("whole", "transposed", "sliced", "expanded", "shared", "parameter")))
        if kind == "transposed" and tensor.dim() > 1:
            tensor = tensor.transpose(0, -1)
        elif kind == "sliced" and tensor.dim() > 0:
            tensor = tensor[draw(st.integers(0, 2)) :: draw(st.integers(1, 3))]
        elif kind == "expanded":
            tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
        elif kind == "shared":
            found[f"twin.{number}"] = tensor
        elif kind == "parameter" and dtype.is_floating_point and dtype.itemsize > 1:
            tensor = torch.nn.Parameter(tensor)
        found[f"some.{number}.weight"] = tensor
    return found


@tiny.examples(150)
@given(
    state=state_dicts(),
    zipped=st.booleans(),
    protocol=st.integers(2, 5),
    wrapped=st.sampled_from(("plain", "lightning", "metadata")),
)
def test_reads_what_torch_load_reads(
    tmp_path_factory: pytest.TempPathFactory, state: Any, zipped: bool, protocol: int, wrapped: str
) -> None:
    if wrapped == "metadata":
        state = OrderedDict(state)
        state._metadata = {"": {"version": 1}}
    path = tmp_path_factory.mktemp("p") / "pytorch_model.bin"
    value = {"epoch": 3, "state_dict": state} if wrapped == "lightning" else state
    try:
        save(value, path, zipped, pickle_protocol=protocol)
    except RuntimeError:  # the older format cannot hold one storage under two dtypes
        return
    mine = values_of(path)
    same(mine, state)
    if zipped or all(tensor.dtype != torch.float8_e4m3fn for tensor in state.values()):  # else torch itself cannot
        loaded = torch.load(path, weights_only=protocol < 4)  # newer protocols it reads unsafely only; the file is ours
        same(mine, loaded["state_dict"] if wrapped == "lightning" else loaded)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("zipped", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_models(tmp_path: Path, kind: str, zipped: bool, dtype: torch.dtype | None) -> None:
    model = tiny.checkpoint(tmp_path, kind, tie_word_embeddings=kind != "mistral")
    (tmp_path / "model.safetensors").unlink()
    save(model.state_dict(), tmp_path / "pytorch_model.bin", zipped)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False, dtype=dtype, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype or tensor.dtype)), name
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (kind != "mistral")
    report = loaded.load_report
    aligned = zipped and dtype is None
    assert (report.bytes_mapped > 0) == aligned or not zipped  # the zip format aligns tensors: none is copied
    assert (report.bytes_copied == 0) == aligned or not zipped


def test_shards_variants_and_what_is_there(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path, "llama")
    state = model.state_dict()
    half = len(state) // 2
    shards = {"pytorch_model-00001-of-00002.bin": list(state)[:half],
              "pytorch_model-00002-of-00002.bin": list(state)[half:]}  # fmt: skip
    for shard, names in shards.items():
        save({name: state[name] for name in names}, tmp_path / shard)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": {n: s for s, names in shards.items() for n in names}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert loaded.load_report.fits
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).load_report.bytes_mapped > 0  # safetensors beside it
    save(state, tmp_path / "pytorch_model.fp16.bin")
    AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False, variant="fp16", strict=True)
    (tmp_path / list(shards)[1]).unlink()
    with pytest.raises(MissingWeightsError, match="00002-of-00002"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    for bad, kind in {"../x.bin": PathError, "x.safetensors": UnsafeFormatError}.items():
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(kind):
            AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


def test_never_without_being_asked(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path, "llama")
    with pytest.raises(NotFoundError, match="use_safetensors=False"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    (tmp_path / "model.safetensors").unlink()
    save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for asked in (None, True):
        with pytest.raises(UnsafeFormatError, match=r"use_safetensors=False.*loadstone convert"):
            AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=asked)


def test_training_never_reaches_the_file_and_twins_are_apart(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path, "llama")
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # one storage, but the model does not tie them
    path = save(state, tmp_path / "pytorch_model.bin")
    before = path.read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    loaded.lm_head.weight.data.zero_()
    assert loaded.model.embed_tokens.weight.any()


def test_device_maps_and_quantization(tmp_path: Path) -> None:
    from loadstone import BitsAndBytesConfig

    model = tiny.checkpoint(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    state = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in model.state_dict().items()}  # strided
    save(state, tmp_path / "pytorch_model.bin")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config={"load_in_4bit": True})
    config = BitsAndBytesConfig(load_in_4bit=True)
    got = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False, quantization_config=config)
    toy_state = wanted.state_dict()
    assert got.state_dict().keys() == toy_state.keys()
    assert all(torch.equal(got.state_dict()[name], tensor) for name, tensor in toy_state.items())
    on_meta = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False, device_map="meta")
    assert on_meta.lm_head.weight.is_meta


# What is refused


class Evil:
    """Asks the reader of its pickle to call something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def code(text: str) -> bytes:
    """A pickle by hand: words are bytes in hexadecimal or quoted text."""
    parts = [word[1:].encode() + b"\n" if word[0] == "'" else bytes.fromhex(word) for word in text.split()]
    return b"".join(parts)


def hostile(mark: str) -> dict[str, bytes]:
    """Pickles that would make a file ``mark``, or do something else that a weights file must not."""
    import os

    shell = f"touch {mark}"
    made = {f"os.system, protocol {n}": pickle.dumps(Evil(os.system, shell), n) for n in range(6)}
    statement = f"open({mark!r}, 'w')"
    made |= {
        "eval": pickle.dumps(Evil(eval, statement), 2),
        "exec": pickle.dumps(Evil(exec, statement), 4),
        "getattr": pickle.dumps(Evil(getattr, 1, "real"), 2),
        "popen": pickle.dumps(Evil(subprocess.Popen, ["touch", mark]), 2),
        "in a dictionary": pickle.dumps({"a": Evil(os.system, shell)}, 2),
        "as a key": pickle.dumps([Evil(os.system, shell)], 2),
        "torch.hub": b"\x80\x02ctorch.hub\nload\n(X\x01\x00\x00\x00atR.",
        "torch._utils import": b"\x80\x02ctorch._utils\n_import_dotted_name\n(X\x01\x00\x00\x00atR.",
        "dotted name": b"\x80\x04\x8c\x05torch\x8c\x10hub.load.__class__\x93)R.",
        "instance": b"(ios\nsystem\n.",
        "object": b"(cos\nsystem\nX\x01\x00\x00\x00ao.",
        "new object": b"\x80\x02cos\nsystem\n)\x81.",
        "extension": b"\x80\x02\x82\x01.",
        "called by a persistent id": b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nK\x00K\x00K\x01tQ.",
        "a state for a dictionary": b"\x80\x02ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__K\x01sb.",
        "numpy": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",
        "bytes by codecs": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R.",
        "a memo of 2^32": b"\x80\x02K\x01r\xff\xff\xff\xff.",
        "an integer of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
        "a text of 2^63": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "laughs": b"\x80\x02]" + b"q\x00(" + b"h\x00h\x00" * 3 + b"e" + b"".join(
            b"(" + bytes([0x68, n]) * 8 + b"t" + bytes([0x71, n + 1]) for n in range(60)) + b".",
        "itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        "a hundred thousand lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "nothing": b"", "no end": b"\x80\x02}", "empty stack": b"\x80\x02.", "underflow": b"\x80\x02a.",
        "two values": b"\x80\x02K\x01K\x02.", "no mark": b"\x80\x02t.", "not UTF-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
        "a list as key": b"\x80\x02}]K\x01s.", "a number": b"\x80\x02K\x01.", "a tuple": b"\x80\x02).",
        "an unknown memo": b"\x80\x02h\x07.", "a call of a number": b"\x80\x02K\x01)R.",
        "a name without end": b"\x80\x02c" + b"x" * 5000,
    }  # fmt: skip
    return made


def as_zip(path: Path, data: bytes, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in (records or {"archive/data/0": b"\0" * 64}).items():
            archive.writestr(name, content)
    return path


HEAD = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]

RUN_ALL = """
import sys
from pathlib import Path
from loadstone.errors import CheckpointError
from loadstone.loading.pickled import read_pickled
import torch, pickle, zipfile
FORBIDDEN = ("os.", "subprocess.", "exec", "compile", "pickle.", "import", "socket.", "shutil.", "ctypes.", "code.",
             "builtins.", "marshal.", "object.", "runpy.")
seen, watching = [], False
def hook(event, arguments):
    if watching and event.startswith(FORBIDDEN):
        seen.append((event, repr(arguments)[:200]))
sys.addaudithook(hook)
files = sorted(Path(sys.argv[1]).iterdir())
for number, file in enumerate([files[0], *files]):  # the first one twice: what it imports is then imported
    watching = number > 0
    try:
        read_pickled(file)
    except CheckpointError as error:
        print(file.name, type(error).__name__, len(str(error)))
    else:
        print(file.name, "READ")
    watching = False
print("EVENTS", seen)
"""


def test_hostile_pickles_run_nothing(tmp_path: Path) -> None:
    """In each place where a file has a pickle; watched by an audit hook, which sees every call out of Python."""
    mark, files = tmp_path / "was-here", tmp_path / "files"
    files.mkdir()
    for number, data in enumerate(hostile(str(mark)).values()):
        as_zip(files / f"{number:03d}-zip.bin", data)
        for place in range(5):
            parts = [*HEAD, pickle.dumps({}, 2), pickle.dumps([], 2)]
            parts[place] = data
            (files / f"{number:03d}-older-{place}.bin").write_bytes(b"".join(parts))
    done = subprocess.run([sys.executable, "-c", RUN_ALL, str(files)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *lines, events = done.stdout.splitlines()
    assert events == "EVENTS []"
    read = [line for line in lines if line.endswith("READ")]
    harmless = list(hostile("")).index("a state for a dictionary")  # there is nothing that could take one
    assert {line[:3] for line in read} <= {f"{harmless:03d}"}, read
    assert len(lines) == 1 + len(list(files.iterdir()))
    assert all(
        int(line.split()[-1]) < 2000 for line in lines if line not in read
    )  # no message grows with what a file holds
    assert not mark.exists()


def test_the_audit_hook_would_see_it(tmp_path: Path) -> None:
    """The test above is worth nothing if the files it makes would do no harm elsewhere."""
    mark = tmp_path / "was-here"
    pickle.loads(hostile(str(mark))["os.system, protocol 2"])
    assert mark.exists()


def tensor_call(shape: Any, strides: Any, offset: Any = 0, count: Any = 16, key: Any = "0", more: bytes = b"") -> bytes:
    """{"w": a tensor}, as torch.save pickles it, with any numbers."""

    def number(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + number(key)
        + b"X\x03\x00\x00\x00cpu"
        + number(count)
        + b"tQ"
    )
    call = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + number(shape) + number(strides)
        + b"\x89ccollections\nOrderedDict\n)R" + more + b"tR"
    )  # fmt: skip
    return b"\x80\x02}X\x01\x00\x00\x00w" + call + b"s."


BAD_TENSORS = {
    "beyond its storage": (tensor_call((17,), (1,)), FormatError),
    "an offset beyond it": (tensor_call((4,), (1,), offset=13), FormatError),
    "strides beyond it": (tensor_call((4, 4), (5, 1)), FormatError),
    "a storage larger than its record": (tensor_call((4,), (1,), count=17), FormatError),
    "negative sizes": (tensor_call((-4,), (1,)), FormatError),
    "negative strides": (tensor_call((4,), (-1,)), FormatError),
    "a negative offset": (tensor_call((4,), (1,), offset=-1), FormatError),
    "sizes that overflow": (tensor_call((1 << 40, 1 << 40), (0, 0)), FormatError),
    "huge sizes": (tensor_call((1 << 62, 4), (0, 0)), FormatError),
    "texts as sizes": (tensor_call(("4",), (1,)), FormatError),
    "booleans as sizes": (tensor_call((True,), (1,)), FormatError),
    "more sizes than strides": (tensor_call((2, 2), (1,)), FormatError),
    "lists as sizes": (tensor_call([4], [1]), FormatError),
    "a storage that is not there": (tensor_call((4,), (1,), key="7"), IntegrityError),
    "a storage of another record": (tensor_call((4,), (1,), key="../data.pkl"), IntegrityError),
    "a storage named by a number": (tensor_call((4,), (1,), key=0), FormatError),
    "a conjugate view": (tensor_call((4,), (1,), more=b"}X\x04\x00\x00\x00conj\x88s"), FormatError),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(tmp_path: Path, case: str) -> None:
    data, kind = BAD_TENSORS[case]
    path = as_zip(tmp_path / "x.bin", data)
    with pytest.raises(kind) as caught:
        read_pickled(path)
    assert str(path) in str(caught.value)
    good = as_zip(tmp_path / "good.bin", tensor_call((4,), (1,)))
    assert values_of(good)["w"].tolist() == [0.0] * 4


UNFIT: dict[str, tuple[Any, str]] = {
    "sparse": ({"w": torch.eye(3).to_sparse()}, "sparse"),
    "sparse rows": ({"w": torch.eye(3).to_sparse_csr()}, "sparse"),
    "quantized": ({"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "quantized"),
    "meta": ({"w": torch.empty(3, device="meta")}, "meta"),
    "conjugate": ({"w": torch.ones(3, dtype=torch.complex64).conj()}, "conjugate"),
    "complex double": ({"w": torch.ones(3, dtype=torch.complex128)}, "ComplexDouble"),
    "a number": ({"w": torch.ones(3), "step": 3}, "'step'"),
    "nested": ({"model": {"w": torch.ones(3)}}, "'model'"),
    "a list": ([torch.ones(3)], "list"),
    "a tensor": (torch.ones(3), "state dict"),
    "numbers as names": ({1: torch.ones(3)}, "int"),
    "a module": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "numpy": ({"w": torch.ones(3).numpy()}, "numpy"),
}


@pytest.mark.parametrize("zipped", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("case", UNFIT)
def test_what_is_no_state_dict_of_plain_tensors(tmp_path: Path, case: str, zipped: bool) -> None:
    value, word = UNFIT[case]
    try:
        path = save(value, tmp_path / "x.bin", zipped)
    except (RuntimeError, NotImplementedError):
        pytest.skip("torch cannot save this in the older format")
    with pytest.raises(CheckpointError, match=word):
        read_pickled(path)


def test_other_files(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    files = {
        "empty": (b"", FormatError),
        "zeros": (b"\0" * 100, FormatError),
        "web page": (b"<!DOCTYPE html><html>", FormatError),
        "tar": (b"x" * 257 + b"ustar" + b"\0" * 300, UnsafeFormatError),
        "safetensors": ((tmp_path / "model.safetensors").read_bytes(), FormatError),
        "no torch archive": (zip_of({"a.txt": b"a"}), FormatError),
        "TorchScript": (
            zip_of({"a/data.pkl": b"\x80\x02}.", "a/constants.pkl": b"\x80\x02)."}),
            UnsafeFormatError,
        ),
        "big-endian": (zip_of({"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"big"}), FormatError),
        "two archives": (zip_of({"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}."}), FormatError),
        "compressed": (zip_of({"a/data.pkl": b"\x80\x02}." + b"0" * 100}, zipfile.ZIP_DEFLATED), FormatError),
    }
    for name, (content, kind) in files.items():
        path = tmp_path / f"{name}.bin"
        path.write_bytes(content)
        with pytest.raises(kind) as caught:
            read_pickled(path)
        assert str(path) in str(caught.value), name
    with pytest.raises(PathError):
        read_pickled(tmp_path)
    with pytest.raises(NotFoundError):
        read_pickled(tmp_path / "none.bin")


def zip_of(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("zipped", FORMATS.values(), ids=FORMATS)
def test_truncated_anywhere(tmp_path: Path, zipped: bool) -> None:
    whole = save({"a": torch.ones(5), "b": torch.zeros(3, 2)}, tmp_path / "x.bin", zipped).read_bytes()
    path = tmp_path / "cut.bin"
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_pickled(path)
    if not zipped:
        path.write_bytes(whole + b"\0")
        with pytest.raises(FormatError, match="after the last storage"):
            read_pickled(path)


@tiny.examples(300)
@given(zipped=st.booleans(), data=st.data())
def test_damaged_files_raise_typed_errors_or_read(
    tmp_path_factory: pytest.TempPathFactory, zipped: bool, data: st.DataObject
) -> None:
    """Bytes changed, inserted or removed at random: never another error, and never bytes outside the file."""
    buffer = io.BytesIO()
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(12.0).view(3, 4).t()}
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    raw = damaged(buffer.getvalue(), data)
    path = tmp_path_factory.mktemp("p") / "x.bin"
    path.write_bytes(raw)
    said, found = str(path), {}
    try:
        found = values_of(path)
    except CheckpointError as error:
        said = str(error)
    assert str(path) in said
    assert all(tensor.numel() < 1000 for tensor in found.values())


# Memory


@pytest.mark.skipif(not peak_memory.AVAILABLE, reason="needs /proc")
@pytest.mark.parametrize(("zipped", "dtype"), [(True, "bfloat16"), (False, "float32"), (False, "bfloat16")])
def test_memory(tmp_path: Path, zipped: bool, dtype: str) -> None:
    """A load takes the model's bytes and little more, in both formats, with and without a cast."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": 6144, "num_hidden_layers": 3}
    model = tiny.checkpoint(tmp_path / "big", "llama", **sizes)
    small = tiny.checkpoint(tmp_path / "small", "llama")
    for name, one in (("big", model), ("small", small)):
        (tmp_path / name / "model.safetensors").unlink()
        save(one.state_dict(), tmp_path / name / "pytorch_model.bin", zipped)
    size = sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize
    call = f"AutoModelForCausalLM.from_pretrained({{}}, use_safetensors=False, dtype={dtype!r})"
    peak = peak_memory.peak_of(
        f"model = {call.format(repr(str(tmp_path / 'big')))}\n"
        "total = sum(float(p.view(-1)[::1024].sum()) for p in model.parameters())",
        "from loadstone import AutoModelForCausalLM\n" + call.format(repr(str(tmp_path / "small"))),
    )
    assert size > 60e6
    assert peak < size + 40e6, f"{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


def test_toy_models_too(tmp_path: Path) -> None:
    """The loading floor alone, with more than one file."""
    tensors = toy.weights()
    save(tensors, tmp_path / "pytorch_model.bin")
    model, report = toy.meta(), None
    from loadstone.loading.load import load_into

    report = load_into(model, toy.opened(tmp_path, use_safetensors=False), initialize=toy.initialize)
    assert toy.same(model, tensors)
    assert report.fits
