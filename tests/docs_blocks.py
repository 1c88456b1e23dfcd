"""The blocks of code in a page of documentation, run as they stand: `python tests/docs_blocks.py PAGE`.

From top to bottom, in the current directory, which should be empty:

- `python` runs in one namespace for the whole page; a block whose first line is `# NAME.py` becomes that file instead.
- `sh` runs in bash, which stops at the first command that fails.
- `diff` shows what an earlier block of Python changes in an ordinary program: with its `+` lines it must be a part of
  that block; the block with its `-` lines instead is run.
- `yaml` must be a configuration. If its first line is `# NAME.yaml` it is also written to that file.
- `text`, `json` and the like are what something looks like: not run.

`<!-- not run: REASON -->` on the line before a block says why it is not run. What a page needs and a reader need not
see is in a comment: `<!-- hidden python`, or `<!-- hidden sh`, then the lines, then `-->`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import yaml

RUN = ("python", "sh", "diff", "yaml")
SHOWN = ("text", "json", "toml", "dockerfile")
_BLOCK = re.compile(
  r"(?:^ *<!-- not run: (?P<reason>[^\n]+?) -->\n)?^(?P<indent> *)"
  r"(?:```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```|<!-- hidden (?P<hidden>\w+)\n(?P<code>.*?)^ *-->)",
  re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
  """A block of code: its language, its text without indentation, the line where the text begins, why it is not run."""

  language: str
  text: str
  line: int
  not_run: str

  @property
  def file(self) -> str:
    """The file that the block says it is; empty if none."""
    named = re.match(r"# ([\w./-]+\.(?:py|yaml))\n", self.text)
    return named[1] if named else ""


def blocks(page: pathlib.Path) -> list[Block]:
  """All blocks of a page, hidden ones too, in order."""
  text = page.read_text(encoding="utf-8")
  found = []
  for match in _BLOCK.finditer(text):
    hidden = match["hidden"] is not None
    code = re.sub(rf"^{match['indent']}", "", match["code" if hidden else "text"], flags=re.MULTILINE)
    line = text.count("\n", 0, match.start("code" if hidden else "text")) + 1
    found.append(Block(match["hidden"] or match["language"], code, line, match["reason"] or ""))
  return found


def run(page: pathlib.Path) -> None:
  """Runs the blocks of a page in the current directory; the first that fails raises."""
  names: dict[str, Any] = {"__name__": "__main__"}
  found = blocks(page)
  for i, block in enumerate(found):
    if block.not_run or block.language not in RUN:
      continue
    print(f"-- {page.name}:{block.line}", flush=True)
    if block.file:
      pathlib.Path(block.file).write_text(block.text)
    if block.language == "python" and not block.file:
      exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
    elif block.language == "sh":
      subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True)
    elif block.language == "diff":
      exec(compile(_before(block, found[:i]), f"{page}:{block.line} (before)", "exec"), {"__name__": "__main__"})
    elif block.language == "yaml":
      import ckpt_jax

      ckpt_jax.Config(**yaml.safe_load(block.text))


def _before(diff: Block, earlier: list[Block]) -> str:
  """The program before a diff was applied to it."""
  lines = diff.text.splitlines(keepends=True)
  old, new = ("".join(line[1:] for line in lines if line[:1] != other) for other in "+-")
  programs = [block.text for block in earlier if new in block.text]
  assert programs, f"line {diff.line}: no earlier block of Python has the lines of this diff"
  return programs[-1].replace(new, old)


def run_as_a_reader(page: pathlib.Path, home: pathlib.Path, timeout: float = 120, **env: str) -> str:
  """Runs a page in a process of its own, with an empty home directory as the current one; returns what it printed."""
  root = pathlib.Path(__file__).parents[1]
  ours = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}  # conftest's are no reader's
  path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  env = ours | {"HOME": str(home), "PATH": path, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"} | env
  command = [sys.executable, __file__, str(page)]
  done = subprocess.run(
    command, cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
  )
  assert done.returncode == 0, done.stdout
  return done.stdout


if __name__ == "__main__":
  sys.path.insert(0, "")  # modules that the page writes
  run(pathlib.Path(sys.argv[1]))
