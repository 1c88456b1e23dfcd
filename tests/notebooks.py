"""Executes the notebooks and writes their outputs: `python tests/notebooks.py [NAME...]`, or `make notebooks`.

Each runs in an empty directory, as a reader's would. What the repository keeps is small: no times of execution, and
pictures with a palette. The outputs of a cell with the tag `varies` depend on the machine; the others are compared by a
test, numbers and directories apart.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

ALL = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
_HERE = "/home/you/notebooks"  # in place of the directory that a notebook ran in
_TIMEOUT_S = 240


def client(notebook: Any, directory: pathlib.Path) -> NotebookClient:
  """What runs a notebook in a directory."""
  resources = {"metadata": {"path": str(directory)}}
  return NotebookClient(notebook, timeout=_TIMEOUT_S, kernel_name="python3", resources=resources)


def execute(path: pathlib.Path, directory: pathlib.Path) -> Any:
  """A notebook with new outputs, after a run from top to bottom in a new kernel."""
  notebook = nbformat.read(path, as_version=4)
  client(notebook, directory).execute()
  for cell in code(notebook):
    cell.metadata.pop("execution", None)
    cell.outputs = [_small(output, directory) for output in cell.outputs]
  notebook.metadata["executed"] = sources(notebook)
  notebook.metadata["language_info"] = {"name": "python"}
  return notebook


def code(notebook: Any) -> list[Any]:
  """The cells of code."""
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sources(notebook: Any) -> str:
  """A hash of the code, kept in the notebook beside the outputs, which are those of this code."""
  return hashlib.sha256(json.dumps([cell.source for cell in code(notebook)]).encode()).hexdigest()


def said(cell: Any) -> list[str]:
  """The outputs of a cell as text, without what differs from run to run."""
  found = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs if o.get("name") != "stderr"]
  text = re.sub(r"\d[\d,.]*", "#", "".join(found))
  return re.sub(r"0x\w+|[ \t-]+", " ", text).split()


def decoded(png: str) -> bytes:
  """A picture of an output."""
  return base64.b64decode(png)


def _small(output: Any, directory: pathlib.Path) -> Any:
  text = json.dumps(output).replace(str(directory), _HERE)
  output = nbformat.from_dict(json.loads(text))
  if (png := output.get("data", {}).get("image/png")) is not None:
    picture = Image.open(io.BytesIO(decoded(png))).convert("RGB").quantize(64)
    small = io.BytesIO()
    picture.save(small, "PNG", optimize=True)
    output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
  return output


def main(names: list[str]) -> None:
  """Writes the outputs of all notebooks, or of those whose names begin so."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  for path in ALL:
    if names and not path.name.startswith(tuple(names)):
      continue
    with tempfile.TemporaryDirectory() as directory:
      nbformat.write(execute(path, pathlib.Path(directory)), path)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
  main(sys.argv[1:])
