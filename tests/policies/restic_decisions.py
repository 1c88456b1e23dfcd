"""Asks restic itself what its `forget` keeps, and records it in tests/policies/restic_decisions.json.

  python tests/policies/restic_decisions.py  # needs restic 0.17 or newer (Debian 13: apt-get install restic); 4 minutes

Older ones do not keep the oldest snapshot of all while a rule has not used up its count; nothing else differs here.
Snapshots are made with `restic backup --time` at random times, one host a run of them, and `restic forget --dry-run
--json` decides. tests/policies/test_restic.py holds Retention to these decisions.
"""

import datetime
import json
import os
import pathlib
import random
import subprocess
import tempfile

HERE = pathlib.Path(__file__).parent
START = datetime.datetime(2025, 12, 20, tzinfo=datetime.timezone.utc)  # a year's end with its odd ISO week
# Seconds between snapshots: minutes, hours, around a day, days to weeks, all at once.
RUNS = {
  "minutes": (60, 1800, 40),
  "hours": (1800, 4 * 3600, 40),
  "days": (6 * 3600, 40 * 3600, 40),
  "weeks": (2 * 86400, 12 * 86400, 24),
  "mixed": (30, 12 * 86400, 40),
}
RULES = ("last", "hourly", "daily", "weekly", "monthly")


def restic(*arguments, env):
  done = subprocess.run(["restic", *arguments], env=env, capture_output=True, text=True, check=True)
  return done.stdout


def times_of(kind, rng):
  low, high, count = RUNS[kind]
  seconds, times = 0.0, []
  for _ in range(count):
    seconds += low * (high / low) ** rng.random()
    times.append(int(seconds))
  return times


def policies(rng):
  for name in RULES:
    for count in (1, 3, 9):
      yield {name: count}
  for within in ("1h", "7h", "1d", "2d6h", "14d", "60d"):
    yield {"within": within}
  for _ in range(20):
    chosen = {name: rng.randint(1, 8) for name in RULES if rng.random() < 0.5}
    if rng.random() < 0.3:
      chosen["within"] = rng.choice(["3h", "1d12h", "10d"])
    yield chosen or {"last": 2}


def main():
  rng = random.Random(0)
  with tempfile.TemporaryDirectory() as directory:
    env = {**os.environ, "TZ": "UTC", "RESTIC_PASSWORD": "x", "RESTIC_REPOSITORY": f"{directory}/repo"}
    restic("init", env=env)
    source = pathlib.Path(directory) / "source"
    source.write_text("x")
    runs = {}
    for kind in RUNS:
      times = times_of(kind, rng)
      for seconds in times:
        when = (START + datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M:%S")
        restic("backup", "--host", kind, "--time", when, str(source), env=env)
      decisions = []
      for rules in policies(rng):
        options = [f"--keep-{name}={value}" for name, value in rules.items()]
        (group,) = json.loads(restic("forget", "--dry-run", "--json", "--host", kind, *options, env=env))
        kept = [datetime.datetime.fromisoformat(s["time"].replace("Z", "+00:00")) for s in group["keep"]]
        decisions.append([rules, sorted(times.index(int((t - START).total_seconds())) for t in kept)])
      runs[kind] = {"seconds": times, "decisions": decisions}
      print(kind, len(decisions), flush=True)
    version = restic("version", env=env).strip()
  recorded = {"restic": version, "start": START.isoformat(), "runs": runs}
  text = json.dumps(recorded, separators=(",", ":")).replace('[{"', '\n[{"').replace('"seconds"', '\n"seconds"')
  (HERE / "restic_decisions.json").write_text(text + "\n")


if __name__ == "__main__":
  main()
