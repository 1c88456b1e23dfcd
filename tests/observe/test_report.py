"""The report: complete, safe from what a run's names contain, and a page that a real browser opens."""

import html.parser
import json
import os
import re
import shutil
import subprocess

import jax.numpy as jnp
import pytest
from commands import cli

import ckpt_jax as ckpt
from ckpt_jax.observe.drawing import chart
from ckpt_jax.observe.report import gather, page

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp("runs") / "a run & <b>"
  state = {"params": {EVIL: jnp.ones((64, 64)), "b": jnp.zeros(4)}}
  config = {"retention": {"last": 3}, "health": {"nonfinite": "tag"}}
  with ckpt.Checkpointer(path, config) as c:
    for step in range(12):
      c.save(step, state if step != 5 else {"params": {EVIL: jnp.full((64, 64), jnp.nan), "b": jnp.zeros(4)}})
  next((path / "11" / "default" / "d").iterdir()).write_bytes(b"")
  with ckpt.Checkpointer(path, config) as c:
    restored = c.restore_or_init(lambda: state)
    for step in range(restored.next_step, 14):
      c.save(step, restored.state)
  return path


class Sections(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.titles, self.tags, self._in = [], [], None
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    self._in = tag

  def handle_data(self, data):
    if self._in == "h2":
      self.titles.append(data)
      self._in = None


def test_every_part_is_there_and_nothing_is_loaded_from_elsewhere(run):
  text = page(gather(run))
  found = Sections(text)
  assert {
    "What the run did with its time",
    "Seconds of each save",
    "Size of the steps",
    "Health: norms of the state by group",
    "Starts and restarts",
    "Retention",
    "Bytes by group of leaves",
    "Bytes written by each process",
    "Trouble",
    "The plan",
    "Saves",
  } <= set(found.titles)
  assert not re.search(r"(https?:)?//\w", text.replace(str(run), "")), "no network"
  assert [tag for tag, attributes in found.tags if {"src", "href", "srcset"} & attributes.keys()] == []
  assert EVIL not in text and "&lt;script&gt;alert(1)" in text and "a run &amp; &lt;b&gt;" in text
  assert "Tagged unhealthy: steps 5." in text and "restored in place of others" in text


def test_a_run_without_records_is_reported_with_what_is_known(tmp_path):
  with ckpt.Checkpointer(tmp_path, {"observe": {"events": False}}) as c:
    c.save(0, {"x": jnp.ones(3)})
  text = page(gather(tmp_path))
  assert "no recorded saves" in text and "Bytes by group of leaves" in text and "Starts and restarts" not in text


def test_the_command_writes_a_page_or_data(run, tmp_path):
  out = tmp_path / "report.html"
  assert cli("report", run, "-o", out).returncode == 0 and "</html>" in out.read_text()
  data = json.loads(cli("report", run, "--json").stdout)
  assert data["attempts"][1]["restored"] == 10 and data["goodput"]["attempts"] == 2
  wrong = cli("report", run, "-o", tmp_path / "no" / "where.html")
  assert wrong.returncode == 2 and "cannot be written" in wrong.stderr
  assert "no such directory" in cli("report", tmp_path / "missing", "-o", out).stderr


def test_a_chart_of_a_hundred_thousand_points_keeps_the_peaks_and_stays_small():
  points = [(float(x), 5.0 if x == 77_777 else 1.0) for x in range(100_000)]
  drawn = chart({"s": points}, str, str)
  assert len(drawn) < 20_000 and min(float(y) for y in re.findall(r",([\d.]+)", drawn)) == 8.0
  assert chart({"s": [(0.0, float("nan"))]}, str, str) == chart({}, str, str) == ""


CHECKS = """<script>
const headers = [...document.querySelectorAll("th button")];
const table = headers.find(b => b.textContent === "blocking").closest("table");
const column = [...table.querySelectorAll("th button")].findIndex(b => b.textContent === "blocking");
const values = () => [...table.tBodies[0].rows].map(row => Number(row.cells[column].dataset.value));
const button = table.querySelectorAll("th button")[column];
button.click();
const up = values();
button.click();
const page = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
const found = {up, down: values(), wide: page.scrollWidth, room: page.clientWidth, dark,
  ink: getComputedStyle(document.body).color};
parent.postMessage(JSON.stringify(found), "*");
</script></body>"""


def browse(file, *options):
  """The page after its scripts ran, and what the browser logged on its console."""
  chromium = shutil.which("chromium")
  if chromium is None:
    assert "CI" not in os.environ, "CI installs chromium"
    pytest.skip("no chromium here (Debian: chromium)")
  flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", *options]
  command = [chromium, *flags, f"--user-data-dir={file.parent / 'profile'}", "--dump-dom", file.as_uri()]
  done = subprocess.run(command, capture_output=True, text=True, timeout=180)
  return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


FRAME = """<iframe src="report.html" width="{}" height="800"></iframe><pre></pre>
<script>onmessage = message => document.querySelector("pre").textContent = message.data</script>"""


@pytest.mark.parametrize(("width", "options"), [(1280, ()), (390, ("--blink-settings=preferredColorScheme=0",))])
def test_a_browser_opens_it_without_an_error_its_tables_sort_and_it_fits(run, tmp_path, width, options):
  (tmp_path / "report.html").write_text(page(gather(run)).replace("</body>", CHECKS), encoding="utf-8")
  (tmp_path / "frame.html").write_text(FRAME.format(width), encoding="utf-8")  # a window is at least 500 pixels wide
  dom, console = browse(tmp_path / "frame.html", "--window-size=1400,900", "--virtual-time-budget=10000", *options)
  assert console == []
  found = json.loads(html.unescape(dom.split("<pre>")[1].split("</pre>")[0]))
  assert found["up"] == sorted(found["up"]) and found["down"] == sorted(found["up"], reverse=True)
  assert len(set(found["up"])) > 5 and width - 20 <= found["wide"] <= found["room"], "nothing scrolls sideways"
  assert found["dark"] == bool(options) and (found["ink"] == "rgb(228, 232, 238)") == found["dark"]
