"Figures and the README follow from what is in results/, in seconds and without training."
from pathlib import Path

import papermill
import pytest

root = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("notebook", sorted((root/"paper_figures").glob("*.ipynb")), ids=lambda p: p.stem)
def test_figure_is_drawn_from_results(notebook, tmp_path):
    papermill.execute_notebook(str(notebook), str(tmp_path/"out.ipynb"), parameters=dict(out=str(tmp_path/"out")), kernel_name="python3", progress_bar=False)
    assert any(p.stat().st_size > 1000 for p in (tmp_path/"out").rglob("*") if p.is_file())
    if notebook.stem == "readme": assert (tmp_path/"out"/"README.md").read_text() == (root/"README.md").read_text(), "run `make figures`"
