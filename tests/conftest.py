"Tests keep to their own cache and never show progress bars."
import pytest


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SYNTHDET_QUIET", "1")
    monkeypatch.setenv("SYNTHDET_CACHE", str(tmp_path_factory.getbasetemp()/"cache"))
