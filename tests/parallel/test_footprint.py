"""A rank's memory while loading is its share of the model, never the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from parallel import footprint, ranks, steps

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig

LARGE = {**steps.SIZES, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 4096}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system tells no peak of memory")
def test_peak_of_memory_is_a_share(places: dict[str, Path], tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama", **LARGE)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).get_memory_footprint()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).get_memory_footprint()
    assert whole > 80e6
    assert packed < 0.4 * whole
    for told in ranks.results(footprint.peaks, 2, places["llama"], tmp_path, 2):
        for strategy, (peak, held, read) in told.items():
            assert held < 0.51 * (packed if strategy == "nf4" else whole), strategy
            assert read == held if strategy != "nf4" else read < 0.51 * whole
            # what is quantized is read tensor by tensor, a few at a time, and never held as the share that it is
            room = 0.2 if strategy == "nf4" else 0.12
            assert held <= peak < held + room * whole, f"{strategy}: {peak} of {whole}"
