"""Executes the notebooks from a clean kernel: `python notebooks/execute.py [--write] [NAMES ...]`.

Any error in a cell is an error here. What they print and draw goes to a temporary place, or with
`--write` back into the notebooks, for a commit.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def execute(source: Path, target: Path) -> float:
    """Runs one notebook in its folder and writes it with its outputs; returns the seconds."""
    began = time.monotonic()
    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            # A slider lives in a kernel only: what is kept is its picture.
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    nbformat.write(notebook, target)
    return time.monotonic() - began


def main() -> None:
    """Executes those that are named, or all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", help="such as 01_generators; by default all")
    parser.add_argument("--write", action="store_true", help="keep the fresh outputs")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    files = sorted(HERE.glob("*.ipynb"))
    if unknown := set(args.names) - {file.stem for file in files}:
        parser.error(f"no notebook {', '.join(sorted(unknown))}")
    chosen = [file for file in files if not args.names or file.stem in args.names]
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(max_workers=2) as pool:
        targets = [file if args.write else Path(temporary) / file.name for file in chosen]
        # The last takes longest.
        for file, seconds in zip(
            reversed(chosen), pool.map(execute, reversed(chosen), reversed(targets)), strict=True
        ):
            print(f"{file.name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
