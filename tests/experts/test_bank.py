"""What a rank holds: gradients that come home are added in fp32 and rounded once; what is frozen stays so."""

import numpy as np
import pytest
import torch
from torch import nn

from outrider.experts.bank import Bank

HOMES = np.array([0, 0, 1, 1, 1])


class Experts(nn.Module):
    """As Hugging Face fuses them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros((5, 4, 3), dtype=dtype))
        self.down_proj = nn.Parameter(torch.zeros((5, 3, 2), dtype=dtype))
        self.act_fn = nn.functional.silu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_gradients_are_added_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    """The home's own is so large that each copy's part alone would be rounded away."""
    large = 2.0 / torch.finfo(dtype).eps  # neighbours lie 2 apart
    bank = Bank(Experts(dtype), HOMES, 1)
    for parameter in bank.parameters():
        parameter.grad = torch.full_like(parameter, large)
    for rank in (3, 0, 2):
        bank.keep_gradient(3, rank, torch.full((bank.numel,), 0.5))
        bank.keep_gradient(3, rank, torch.full((bank.numel,), 0.5))  # it came twice in this step
    bank.settle()
    for parameter in bank.parameters():
        assert parameter.grad is not None
        assert (parameter.grad[bank.row_of[3]] == large + 4).all()  # + 3, and of two as near the even one
        assert (parameter.grad[bank.row_of[2]] == large).all()


def test_only_what_learns_gets_a_gradient() -> None:
    experts = Experts(torch.float32)
    experts.down_proj.requires_grad_(False)
    bank = Bank(experts, HOMES, 0)
    assert [parameter.requires_grad for parameter in bank.parameters()] == [True, False]
    assert bank.learns
    bank.settle()
    assert bank.gate_up_proj.grad is None, "no backward pass ran: an optimizer must not see zeros"
    bank.enter_backward(bank.batch)
    bank.keep_gradient(1, 1, torch.arange(float(bank.numel)))
    bank.settle()
    assert bank.gate_up_proj.grad is not None
    assert bank.gate_up_proj.grad[1].flatten().tolist() == list(range(12))
    assert bank.down_proj.grad is None
    bank.settle()
    assert bank.gate_up_proj.grad[1].flatten().tolist() == list(range(12)), "added twice"
