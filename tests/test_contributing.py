"""What the documentation names is there: paths, dotted names, configuration keys, commands and their options."""

import importlib
import inspect
import itertools
import pathlib
import re
import shlex
import tomllib

import pytest
import typer

import ckpt_jax as ckpt
from ckpt_jax.cli.app import app

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
(LAYERS,) = (c["layers"] for c in PROJECT["tool"]["importlinter"]["contracts"] if "layers" in c)
ROOMS = {room for layer in LAYERS for room in re.split(r"[\s|]+", layer)}
FILES = ("ini", "ipynb", "json", "md", "png", "py", "sh", "svg", "toml", "txt", "xz", "yaml", "yml")
WRITTEN_LATER = {"ckpt_jax.json", "run.yaml", "health.meant", "site"}  # in a step, by the reader, by make docs
WRITTEN_LATER |= {"ckpt_jax_export.json", "model.safetensors", "model.safetensors.index.json"}  # in an export
FOREIGN = {"TrainState", "eqx", "flax", "gc", "grain", "jax", "logging", "multiprocessing", "nnx", "numpy"}
FOREIGN |= {"dcp", "future", "theirs", "torch"}
FOREIGN |= {"error", "jnp", "ocp", "os", "restored", "safetensors", "v1"}
OBJECTS = {"c": ckpt.Checkpointer} | {name: getattr(ckpt, name) for name in ckpt.__all__}


def codes(page):
  """What stands between backticks, blocks of code left out."""
  text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
  text = re.sub(r"^\|.*\bplain Orbax\b.*\n(\|.*\n)*", "", text, flags=re.MULTILINE)  # tables that a benchmark fills
  return sorted({" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)})


def is_there(path):
  """Whether a file or directory exists, named from the root, from the package, from tests/ or without its folder."""
  candidates = [ROOT / path, ROOT / "ckpt_jax" / path, ROOT / "tests" / path]
  if "/" not in path.rstrip("/"):
    candidates += [*ROOT.glob(f"*/**/{path}")] if not path.startswith(".") else []
  return any(candidate.exists() for candidate in candidates)


def is_path(code):
  if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", code) or code.rpartition("/")[2] in WRITTEN_LATER:
    return False
  first = code.partition("/")[0]
  known = (ROOT / first).is_dir() or first in ROOMS
  return code.endswith("/") or ("/" in code and known) or pathlib.PurePath(code).suffix[1:] in FILES


def has(holder, name):
  """Whether an object has a name: as an attribute, a field, or an attribute that its docstring lists."""
  fields = {**getattr(holder, "model_fields", {}), **getattr(holder, "__dataclass_fields__", {})}
  listed = re.search(rf"^ {{2,4}}(\w+, )*{name}\b.*:", inspect.getdoc(holder) or "", re.MULTILINE)
  return hasattr(holder, name) or name in fields or listed is not None


def is_config_key(parts):
  section = ckpt.Config
  for part in parts:
    field = getattr(section, "model_fields", {}).get(part)
    if field is None:
      return False
    kinds = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if inspect.isclass(kind)]
    section = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
  return True


def is_name(parts):
  """Whether a dotted name exists: of a module of the package, of something it exports, or of the configuration."""
  if is_config_key(parts):
    return True
  if parts[0] in OBJECTS and has(OBJECTS[parts[0]], parts[1]):
    return True
  if parts[0] in ("ckpt", "ckpt_jax"):
    parts = parts[1:]
  held, left = ckpt, list(parts)
  while left and has(held, left[0]) and not inspect.ismodule(getattr(held, left[0], None)):
    held, left = getattr(held, left[0], None), left[1:]
  if not left:
    return True
  for end in range(len(parts), 0, -1):
    try:
      held = importlib.import_module(".".join(["ckpt_jax", *parts[:end]]))
    except ImportError:
      continue
    for part in parts[end:]:
      if not has(held, part):
        return False
      held = getattr(held, part, None)
    return True
  return False


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_and_names_exist(page):
  missing = []
  for code in codes(page):
    bare = re.sub(r"\(.*\)$", "", code)
    if is_path(code):
      missing += [] if is_there(code) else [code]
    elif re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", bare):
      parts = bare.split(".")
      known = parts[0] in FOREIGN or code in WRITTEN_LATER
      missing += [] if known or is_name(parts) else [code]
    elif re.fullmatch(r"test_\w+", bare):
      found = any(f"def {bare}(" in path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
      missing += [] if found else [code]
  assert not missing, f"{page.name} names what is not there: {missing}"


def test_names_in_the_recipes_occur_in_the_code():
  recipes = (ROOT / "CONTRIBUTING.md").read_text().partition("## Recipes")[2]
  names = set(re.findall(r"`(\w+)`", recipes))
  code = "\n".join(path.read_text() for folder in ("ckpt_jax", "tests") for path in ROOT.glob(f"{folder}/**/*.py"))
  assert names - set(re.findall(r"\w+", code)) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
  links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()) if "://" not in link]
  assert [link for link in links if not (page.parent / link).exists()] == []


def command_lines(page):
  text = page.read_text()
  lines = re.findall(r"^(ckpt-jax [^\n#]+)", text, re.MULTILINE)
  return lines + [code for code in codes(page) if code.startswith("ckpt-jax ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_have_these_names_and_options(page):
  for line in command_lines(page):
    command = typer.main.get_command(app)
    words = shlex.split(line.replace("[", "").replace("]", "").replace("...", ""))[1:]
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
      default = command.commands.get("suites")
      assert words[0] in command.commands or default is not None, line
      command = command.commands.get(words.pop(0), default)
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    asked = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert asked <= options, f"{line}: {sorted(asked - options)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_exist(page):
  targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
  named = re.findall(r"^make ([a-z-]+)", page.read_text(), re.MULTILINE)
  named += [word for code in codes(page) if code.startswith("make ") for word in code.split()[1:]]
  assert set(named) <= targets


def test_the_map_lists_every_room_in_the_order_that_the_linter_checks():
  table = (ROOT / "CONTRIBUTING.md").read_text().partition("| room | holds |")[2].partition("\n\n")[0]
  rows = [re.findall(r"`(\w+)/?`", line.split("|")[1]) for line in table.splitlines()[2:]]
  height = {room: -number for number, layer in enumerate(LAYERS) for room in re.split(r"[\s|]+", layer)}
  assert sorted(room for row in rows for room in row) == sorted(ROOMS)
  for above, below in itertools.pairwise(rows):
    assert max(height[room] for room in above) <= min(height[room] for room in below), (above, below)
