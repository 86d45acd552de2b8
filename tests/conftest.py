"Tests keep to their own cache and never show progress bars."
import pytest


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SYNTHDET_QUIET", "1")
    monkeypatch.setenv("SYNTHDET_CACHE", str(tmp_path_factory.getbasetemp()/"cache"))


@pytest.fixture(scope="module")
def one_thread():
    "Sums of floats depend on how many threads share them, and small networks gain nothing from several."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
