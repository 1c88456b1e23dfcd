"""The documentation is true: its blocks of code run, its reference is whole, the site builds and needs no network."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pydantic
import pytest
import typer
from docs_blocks import RUN, SHOWN, blocks, run_as_a_reader

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNABLE = [page for page in PAGES if any(b.language in RUN and not b.not_run for b in blocks(page))]
SERVERS = {"gcs.md": "gcs", "s3.md": "s3"}  # page -> the fixture whose bucket it uses


def named(pages):
  return {"argvalues": pages, "ids": [str(p.relative_to(ROOT)) for p in pages]}


@pytest.fixture(scope="module")
def hooks():
  spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "scripts" / "hooks.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("page", **named(RUNNABLE))
def test_blocks_of_a_page_run_as_they_stand(page, tmp_path, request):
  if page.name in SERVERS:
    request.getfixturevalue(SERVERS[page.name])
  run_as_a_reader(page, tmp_path)


@pytest.mark.parametrize("page", **named(PAGES))
def test_every_block_says_its_language_and_runs_or_says_why_not(page):
  assert [f"line {b.line}: {b.language!r}" for b in blocks(page) if b.language not in (*RUN, *SHOWN)] == []


def public_names():
  submodules = ("observe", "policies", "multihost")
  names = {f"ckpt_jax.{name}" for name in ckpt.__all__ if name not in (*submodules, "__version__")}
  for module in submodules:
    held = getattr(ckpt, module)
    own = [n for n, v in vars(held).items() if n[0].islower() and getattr(v, "__module__", "") == held.__name__]
    names |= {f"ckpt_jax.{module}.{name}" for name in getattr(held, "__all__", own) if name != "main"}
  return names


def test_readme_is_short_and_installs_what_there_is():
  text = (ROOT / "README.md").read_text()
  assert text.count("\n") <= 150
  ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  first, *others = re.search(r"'\.\[([\w,]+)\]'.*; or (\w+), (\w+) \.\.\.", text).groups()
  jaxs = importlib.metadata.metadata("jax").get_all("Provides-Extra")
  assert {*first.split(","), *others} <= set(ours) and set(re.findall(r"'jax\[(\w+)\]'", text)) <= set(jaxs)
  assert re.findall(r"^make (\w+)", text, re.MULTILINE) == re.findall(
    r"^make (\w+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE
  )


def test_picture_is_drawn(tmp_path):
  script = ROOT / "docs" / "scripts" / "picture.py"
  subprocess.run([sys.executable, script, tmp_path / "picture.svg"], check=True, timeout=60)
  words = [
    set(re.findall(r">([^<>\n]+)</text>", p.read_text()))
    for p in (tmp_path / "picture.svg", ROOT / "docs" / "picture.svg")
  ]
  assert words[0] == words[1] and "save returns: a copy is on its way" in words[0]


def test_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
  env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  pages = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*.html")}
  assert {"index.html", "start.html", "contributing.html", "reference/config.html"} <= set(pages)
  fetched = r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
  assert [name for name, text in pages.items() if re.search(fetched, text)] == []
  assert [name for name, text in pages.items() if "from the code:" in text] == []
  anchors = set(re.findall(r'id="(ckpt_jax\.[\w.]+)"', pages["reference/api.html"]))
  assert public_names() - anchors == set()


def config_keys(section=ckpt.Config, path=""):
  for name, field in section.model_fields.items():
    yield f"{path}{name}"
    for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
      if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        yield from config_keys(kind, f"{path}{name}.")


def test_reference_has_every_configuration_key_with_its_meaning(hooks):
  rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+) \|$", hooks.config_keys(), re.MULTILINE))
  assert list(rows) and set(rows) == set(config_keys())
  assert [key for key, row in rows.items() if not all(row.split(" | ")[i].strip() for i in (0, 2))] == []
  assert "`auto`, `on` or `off` | `off` |" in rows["layout.pack"]


def all_commands(command, name="ckpt-jax"):
  yield name, command
  for inner, child in getattr(command, "commands", {}).items():
    yield from all_commands(child, f"{name} {inner}")


def test_reference_has_every_command_and_option(hooks):
  text = hooks.commands()
  for name, command in all_commands(typer.main.get_command(app)):
    section = text.partition(f"# `{name}`\n")[2].partition("\n## `")[0] if " " in name else text
    listed = set(re.findall(r"[\w@-]+", " ".join(re.findall(r"^\* `([^`]+)`", section, re.MULTILINE)).lower()))
    for parameter in command.params:
      option = parameter.param_type_name == "option"
      names = parameter.opts if option else [(parameter.metavar or parameter.name).lower().strip("[].")]
      assert set(names) <= listed, f"{name}: {names}"


def test_page_about_the_process_names_every_thread_and_environment_variable():
  page = (ROOT / "docs" / "process.md").read_text()
  rooms = [p for p in (ROOT / "ckpt_jax").rglob("*.py") if p.parent.name not in ("bench", "examples")]
  code = "\n".join(p.read_text() for p in rooms)
  threads = set(re.findall(r'"(ckpt_jax[_-][a-z]+)"', code))
  threads -= set(re.findall(r'ContextVar\[.*\("(\w+)"', code))
  variables = set(re.findall(r'environ\S*?[\[(]"([A-Z_]+)"', code)) | set(re.findall(r'= "(XLA_PJRT\w+)"', code))
  assert len(threads) > 15 and len(variables) > 8
  missing = {name for name in threads | variables if name not in page and not name.startswith("AWS_")}
  assert missing == set()
