"""Objects show themselves on one screen, in a shell, in a notebook and in `help`, whatever they hold."""

import html.parser
import pydoc
import re
import textwrap

import jax
import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt
from ckpt_jax.storage.kinds import StorageKind
from ckpt_jax.tuning.assumed import assumed_profile

STATE = {"params": {f"w{i}": jnp.ones((256, 256)) for i in range(300)}, "key": jax.random.key(0), "note": "x" * 5000}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
  """Public objects by name, of a run whose state has hundreds of leaves."""
  run = tmp_path_factory.mktemp("run")
  with ckpt.Checkpointer(run, {"retention": {"last": 3}}) as c:
    found = {"fresh": c, "no plan": c.plan}
    first = {"w": jnp.ones(3)}
    c.save(0, first, metrics={"loss": 0.5}, extras={"data": list(range(10_000))})
    c.save(1, STATE, metrics={f"m{i}": float(i) for i in range(1000)})
    c.wait()
    c.pin(0)
    found |= {"restored": c.restore(1, like=STATE), "initialised": ckpt.Restored(STATE, None, 0, {}, None, None)}
    found |= {"small": c.restore(0), "info": c.steps()[0], "checkpointer": c, "plan": c.plan}
    found["export"] = ckpt.export(run, 1, run.parent / "export")
  return found | {
    "profile": assumed_profile(StorageKind.GCS, "gs://b"),
    "diff": ckpt.diff(run, 0, run, 1),
    "estimate": ckpt.estimate("70b"),
  }


NAMES = ["fresh", "no plan", "restored", "initialised", "small", "info", "checkpointer", "plan", "export", "profile"]
NAMES += ["diff", "estimate"]


@pytest.mark.parametrize("name", NAMES)
def test_objects_fit_on_a_screen(shown, name):
  text = repr(shown[name])
  assert text.startswith(type(shown[name]).__name__ + "(") and len(text) < 1000 and "\n" not in text


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("no plan", "info", "export")])
def test_objects_are_tables_in_notebooks(shown, name):
  found = shown[name]._repr_html_()
  opened = []

  class Parser(html.parser.HTMLParser):
    def handle_starttag(self, tag, attrs):
      opened.append(tag)

    def handle_endtag(self, tag):
      assert opened.pop() == tag

  Parser().feed(found)
  assert not opened and found.startswith("<table>") and len(found) < 40_000


def test_what_they_say(shown):
  says = {name: repr(value) for name, value in shown.items()}
  assert "last=3" in says["checkpointer"] and "2 by this object, the last of step 1 with 75" in says["checkpointer"]
  assert "step 1; next step 2; state 75.0 MiB in 302 leaves; read by direct" in says["restored"]
  assert "none, initialised afresh; next step 0" in says["initialised"] and "loss" in says["small"]
  assert re.search(r"StepInfo\(0: 12 B, 20..-..-.. ..:.. UTC, loss=0.5, pinned\)", says["info"])
  assert "assumed, not measured" in says["profile"] and "writes 1 GB/s" in says["profile"]
  assert "300 leaves, 75.0 MiB -> 37.5 MiB, 0 quantised, at most 0.00% lost of a leaf" in says["export"]


def test_before_the_first_save_the_plan_says_what_it_will_decide(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"limits": {"file_io_concurrency": 8}}) as c:
    assert not c.plan and c.plan.values == {}
    text = c.plan.explain()
  assert "plan: not made yet" in text and "it will decide layout.compression, " in text
  assert "set by you: limits.file_io_concurrency: 8" in text


def test_help_is_a_manual_whose_example_runs(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  text = pydoc.plain(pydoc.render_doc(ckpt))
  assert text.index("A worked example") < text.index("PACKAGE CONTENTS")
  topics = ckpt.__doc__[ckpt.__doc__.index("By topic") :]
  missing = [n for n in ckpt.__all__ if n != "__version__" and not re.search(rf"\b{n}\b", topics)]
  assert missing == []
  blocks = re.findall(r"(?:^    .*\n|^\n)+", ckpt.__doc__[: ckpt.__doc__.index("By topic")], re.MULTILINE)
  scope = {}
  exec(compile(textwrap.dedent(max(blocks, key=len)), "help", "exec"), scope)
  assert scope["c"].steps()[-1].step == 99 and scope["state"]["step"] == 100
