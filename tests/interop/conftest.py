import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """On few busy cores the threads of torch wait for each other longer than one takes alone."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
