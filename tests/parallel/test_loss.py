"""The loss over a head whose rows are shared out is that over the whole head, and so are its gradients."""

from __future__ import annotations

import torch
from parallel import losses, ranks

from loadstone.kernels import linear_cross_entropy


def test_it_is_the_loss_of_the_whole_head() -> None:
    told = ranks.results(losses.shared, 2)
    for name, case in losses.CASES.items():
        loss, for_hidden, for_weight = losses.whole(name)
        rough = case.get("dtype") is torch.bfloat16
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if rough else {"rtol": 1e-5, "atol": 1e-6}
        for rank, found in enumerate(told):
            assert found[name][0].dtype == torch.float32
            assert torch.allclose(found[name][0], loss, **tolerance), name
            assert torch.allclose(found[name][1], for_hidden, **tolerance), name
            assert torch.allclose(found[name][2], for_weight.chunk(2)[rank], **tolerance), name
            assert found[name][1].dtype == for_hidden.dtype
            assert found[name][2].dtype == for_weight.dtype
    hidden, weight, labels, _ = losses.made(9)
    for found in told:
        assert torch.allclose(found["no gradients"], linear_cross_entropy(hidden, weight, labels))
        assert f"0 to {losses.VOCABULARY - 1}" in found["outside"]
