"""Which fused attention kernel a training uses."""

from __future__ import annotations

import pytest
import torch

from vivace.tiny.train.common import Processes
from vivace.training.fused_attention import choose_fastest


def test_a_processor_has_nothing_to_choose() -> None:
    assert choose_fastest(Processes(0, 1, torch.device("cpu")), 2, 2, 16, 8) == "auto"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_faster_kernel_stays_switched_on(capsys) -> None:
    name = choose_fastest(Processes(0, 1, torch.device("cuda")), 8, 4, 1024, 64)
    assert name in ("auto", "cudnn")
    assert torch.backends.cuda.flash_sdp_enabled() == (name == "auto")
    Processes(0, 1, torch.device("cuda")).choose_attention("auto")
    assert f"{name} is used" in capsys.readouterr().out
