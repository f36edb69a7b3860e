"""PyTorch Lightning around our models: the losses of a plain loop, and a checkpoint that resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning", reason="PyTorch Lightning is not installed (pip install lightning)")
ROWS = torch.stack([(torch.arange(10) + start) % 61 for start in range(12)])


class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
    """A model in the house's way of training."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.seen: list[float] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = self.model(batch, labels=batch).loss
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        outputs = self.model(batch, labels=batch)
        assert outputs.logits is not None
        self.log("held out", outputs.loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)


def fit(module: Module, place: Path, steps: int, resume: str | None = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=place, enable_checkpointing=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    loader = DataLoader(ROWS, batch_size=2)  # type: ignore[arg-type]
    trainer.fit(module, loader, DataLoader(ROWS[:4], batch_size=2), ckpt_path=resume)  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_fit_is_a_plain_loop_and_resumes(kind: str, tmp_path: Path) -> None:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    model = tiny.model(kind, **dropout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plain = []
    for batch in ROWS.split(2):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.append(loss.item())
    module = Module(tiny.model(kind, **dropout).train())
    trainer = fit(module, tmp_path, 6)
    assert module.seen == plain
    assert "held out" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Module(tiny.model(kind, seed=5, **dropout).train())
    fit(again, tmp_path, 9, resume=str(tmp_path / "a.ckpt"))
    whole = Module(tiny.model(kind, **dropout).train())
    fit(whole, tmp_path, 9)
    assert again.seen == whole.seen[6:]
    assert len(again.seen) == 3


def test_bfloat16_by_lightning(tmp_path: Path) -> None:
    module = Module(tiny.model("llama").train())
    fit(module, tmp_path, 6, precision="bf16-mixed")
    exact = Module(tiny.model("llama").train())
    fit(exact, tmp_path, 6)
    assert module.seen == pytest.approx(exact.seen, rel=0.03)
    assert module.model.dtype == torch.float32
