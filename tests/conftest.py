import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
# Beside other work on the machine, threads that spin between the twins' many small steps make them 10 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings
from models import fetch_smollm2_or_skip

settings.register_profile(
    "quest_ops",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("QUEST_OPS_TEST_EXAMPLES", 50)),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors],
)
settings.load_profile("quest_ops")

_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(_NO_GPU)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every device that the ops run on; hypothesis needs the session scope."""
    return request.param


@pytest.fixture
def without_humming(monkeypatch):
    """Low-bit products are torch's, where humming is installed too."""
    monkeypatch.setattr("quest_ops.llama.humming_linear._is_installed", lambda: False)


@pytest.fixture(scope="session")
def smollm2_checkpoint():
    """The embedded model in float32, read once for all tests: that takes seconds. Copy the state dict before a model is
    made of it. Skips the test where it cannot be fetched."""
    from quest_ops.llama.weights import load_checkpoint

    return load_checkpoint(fetch_smollm2_or_skip(), dtype=torch.float32)


@pytest.fixture
def smollm2(smollm2_checkpoint, monkeypatch):
    """The embedded model's file, which Llama.load does not read again but to keep its 4 bits."""
    from quest_ops.llama.weights import Checkpoint, load_checkpoint

    path = fetch_smollm2_or_skip()

    def load(source, *, dtype=None, device="cpu", progress=None, keep_int4=False):
        if source not in ("smollm2", path) or keep_int4:
            return load_checkpoint(source, dtype=dtype, device=device, progress=progress, keep_int4=keep_int4)
        weights = {name: weight.to(device, dtype) for name, weight in smollm2_checkpoint.state_dict.items()}
        return Checkpoint(smollm2_checkpoint.config, weights, smollm2_checkpoint.tokenizer)

    monkeypatch.setattr("quest_ops.llama.model.load_checkpoint", load)
    return path
