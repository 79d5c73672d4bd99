import functools

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """On few busy cores the threads of torch wait for each other longer than one takes alone."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def interpreted(monkeypatch):
    """JAX interprets the kernels that torch would launch."""
    from interpreted import Interpreted
    from reference_encoder import encode_by_reference

    from interop import torch_append, torch_attend, torch_kernels
    from pallas_kernels.append import AppendPlan
    from pallas_kernels.encode import triton as encode_triton

    monkeypatch.setattr(encode_triton, "encode_pages", encode_by_reference)
    monkeypatch.setattr(torch_kernels, "TorchProgram", Interpreted)
    monkeypatch.setattr(torch_append, "AppendPlan", functools.partial(AppendPlan, interpret=True))
    monkeypatch.setattr(torch_attend, "_Static", functools.partial(torch_attend._Static, interpret=True))
