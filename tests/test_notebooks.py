"""The committed notebooks: executed, without errors, naming no machine. No kernel runs here."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
PATHS = ("/work/", "/tmp/", "/home/", "/root/", "/Users/", "C:\\\\")


def test_there_are_notebooks_to_look_at():
    assert [file.stem[:2] for file in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_kept_as_a_clean_kernel_left_it(file):
    cells = json.loads(file.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("data" in o and "image/png" in o["data"] for o in outputs) or "merge" in file.stem
    assert any(output.get("name") == "stdout" for output in outputs)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_begins_with_the_cell_for_colab_and_names_no_machine(file):
    text = file.read_text()
    first = json.loads(text)["cells"][0]
    source = "".join(first["source"])
    assert first["cell_type"] == "code"
    assert 'if "google.colab" in sys.modules:' in source
    assert source.index("google.colab") < source.index("pip install")
    assert first["outputs"] == []
    assert not [path for path in PATHS if path in text]
