"Tests keep to their own cache and never show progress bars."
import pytest

from synthdet import core


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SYNTHDET_QUIET", "1")
    monkeypatch.setenv("SYNTHDET_CACHE", str(tmp_path_factory.getbasetemp()/"cache"))
    monkeypatch.setattr(core, "_DOOR", [core._argument]) # through which one a test comes says nothing of the next


@pytest.fixture(scope="module")
def one_thread():
    "Sums of floats depend on how many threads share them, and small networks gain nothing from several."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    "A small domain in a folder, as a user's own."
    from synthdet.data.domains import load_domain, write_domain
    butterflies = load_domain("butterflies", n_class_images=16, n_backgrounds=6)
    return write_domain(butterflies, tmp_path_factory.mktemp("domain")/"birds", n_labelled=8)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    "The trees of the public data sets, drawn."
    from synthdet.data.fixtures import make_fixture, TREES
    root = tmp_path_factory.mktemp("data")
    for d in TREES: make_fixture(d, root)
    return root
