import importlib.util
import logging
import warnings

import pytest
from vllm_engines import PRECISE, PROMPTS, SAME, VOCABULARY, make_model, own_answers

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # on few busy cores the threads of OpenMP wait for each other
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="session", autouse=True)
def imported():
    """vLLM, whose imports warn of what they deprecate themselves."""
    if importlib.util.find_spec("vllm") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import vllm.entrypoints.llm
            import vllm.model_executor.models.utils
            import vllm.v1.worker.cpu_worker  # noqa: F401
        yield


@pytest.fixture(scope="session")
def prompts():
    """Token ids."""
    import torch

    ids = torch.randint(5, VOCABULARY, (len(PROMPTS), max(PROMPTS)), generator=torch.Generator().manual_seed(1))
    return [row[:count].tolist() for row, count in zip(ids, PROMPTS, strict=True)]


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("two_layers"), 2)


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("four_layers"), 4)


@pytest.fixture(scope="session")
def expected(two_layers, prompts):
    """Greedy tokens of our own cache of 4 bits."""
    return own_answers(two_layers, prompts)


@pytest.fixture
def said():
    """The messages that the backend logs, whatever vLLM makes of the loggers above it, and has logged before."""
    from vllm import logger as of_vllm

    for once in (of_vllm._print_info_once, of_vllm._print_warning_once):
        once.cache_clear()
    messages = []

    def note(record):  # a filter, because vLLM takes all handlers from the loggers below its own when it sets them up
        messages.append(record.getMessage())
        return True

    logger = logging.getLogger("vllm.tq_jax")
    logger.addFilter(note)
    yield messages
    logger.removeFilter(note)


@pytest.fixture(scope="session")
def precise(two_layers, prompts):
    """Greedy tokens of our own cache of 8 bits."""
    from interop.vllm.options import Options

    key, value = Options(**PRECISE).quantizers(32)
    return [tokens[:SAME] for tokens in own_answers(two_layers, prompts, key=key, value=value)]
