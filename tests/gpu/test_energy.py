"""NVML's counter of the GPU that torch computes on. Run with `pytest -m gpu`."""

import pytest
import torch

from service.telemetry.energy import Energy, Nvml, meter_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]


def test_work_of_half_a_second_is_counted():
    meter = meter_for(torch.device("cuda"))
    if meter is None:
        pytest.skip("this GPU has no counter, or is divided (MIG)")
    assert isinstance(meter, Nvml)
    account = Energy(meter)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    account.begin()
    start.record()
    for _ in range(400):
        matrix @ matrix
    end.record()
    torch.cuda.synchronize()
    used_j, seconds = account.end(), start.elapsed_time(end) / 1e3
    # a GPU at work draws tens to over a thousand watts; the counter may be 100 ms behind
    assert 20 * (seconds - 0.2) < used_j < 1500 * (seconds + 0.2)
