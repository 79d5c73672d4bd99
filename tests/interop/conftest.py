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

    from interop.launcher import program
    from interop.torch import append_on_gpu, attend_on_gpu
    from pallas_kernels.append.whole_cache import AppendPlan
    from pallas_kernels.encode import launch_triton as encode_triton

    monkeypatch.setattr(encode_triton, "encode_pages", encode_by_reference)
    monkeypatch.setattr(program, "TorchProgram", Interpreted)
    monkeypatch.setattr(append_on_gpu, "AppendPlan", functools.partial(AppendPlan, interpret=True))
    monkeypatch.setattr(attend_on_gpu, "_Static", functools.partial(attend_on_gpu._Static, interpret=True))
