"""Configuration: strict, with line numbers and the nearest right name."""

import pathlib

import pytest

import ckpt_jax as ckpt

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
  "name", ["local_ssd", "network_disk", "nfs", "gcs", "s3", "bucket_mount", "laptop", "multihost_gpu"]
)
def test_shipped_config_says_what_it_is_for_loads_and_comes_back_from_its_dict(name):
  config = ckpt.load_config(CONFIGS / f"{name}.yaml")
  first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
  page = (CONFIGS.parent / "docs" / "configuration.md").read_text()
  assert first.startswith("# ") and len(first) > 40 and f"| `{name}` |" in page
  assert config != ckpt.Config() and ckpt.load_config(name) == config
  assert ckpt.Config(**config.to_dict()) == config


def load(tmp_path, text):
  file = tmp_path / "run.yaml"
  file.write_text(text)
  return ckpt.load_config(file)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("schedule:\n  evry_steps: 5\n", "run.yaml:2: schedule.evry_steps: unknown key; did you mean every_steps?"),
    ("\nretension: {last: 3}\n", "run.yaml:2: retension: unknown key; did you mean retention?"),
    ("every_steps: 5\n", "schedule.every_steps"),
    ("retention: {last: 0}\n", "run.yaml:1: retention.last"),
    ("retention: {last: 3}\nretention: {last: 4}\n", "run.yaml:2: retention: given twice, first on line 1"),
    ("schedule: {every: 10 parsecs}\n", "is no duration"),
    ("schedule: {every: 10m, every_steps: 5}\n", "exclude each other"),
    ("layout: {compression: lz4}\n", "not one of auto, on, off, zstd, shuffled"),
    ("limits: {file_io_concurrency: 0}\n", "run.yaml:1: limits.file_io_concurrency: 0 is no count"),
    ("- a\n", "expected sections"),
    ("a: [\n", "not YAML"),
  ],
)
def test_mistake_is_reported_with_file_and_line(tmp_path, text, message):
  with pytest.raises(ckpt.ConfigError) as e:
    load(tmp_path, text)
  assert message in str(e.value) and "run.yaml" in str(e.value)


def test_all_mistakes_are_reported_at_once(tmp_path):
  with pytest.raises(ckpt.ConfigError) as e:
    load(tmp_path, "retention: {lst: 3}\nlimits:\n  host_memory: lots\n")
  assert len(str(e.value).splitlines()) == 2


def test_missing_file_names_the_nearest_or_what_is_shipped(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "train.yaml").write_text("")
  with pytest.raises(ckpt.ConfigError, match=rf"did you mean {tmp_path}/train\.yaml\?"):
    ckpt.load_config(tmp_path / "trian.yaml")
  with pytest.raises(ckpt.ConfigError, match=r"did you mean laptop\?"):
    ckpt.load_config("labtop")
  with pytest.raises(ckpt.ConfigError, match="ships bucket_mount, gcs, laptop"):
    ckpt.load_config("nothing/like/it.yml")


def test_file_goes_before_the_shipped_one_of_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "nfs").write_text("retention: {last: 7}")
  assert ckpt.load_config("nfs").retention.last == 7


def test_python_config_takes_dicts_and_names_mistakes():
  assert ckpt.Config(retention={"last": 2}, layout={"pack": "on"}).retention.last == 2
  with pytest.raises(ckpt.ConfigError, match="did you mean last"):
    ckpt.Config(retention={"lst": 2})


def test_units_and_yaml_booleans(tmp_path):
  config = load(
    tmp_path,
    "schedule: {every: 1h30m}\nlayout: {compression: on, replica_parallel: off}\nlimits: {host_memory: 2GiB}\n",
  )
  assert config.schedule.every == 5400
  assert (config.layout.compression, config.layout.replica_parallel) == ("on", "off")
  assert config.limits.host_memory == 2 << 30


def test_empty_file_is_the_defaults_which_keep_every_step(tmp_path):
  assert load(tmp_path, "") == ckpt.Config() == ckpt.Config(retention={})
  for config in (ckpt.Config(), ckpt.Config(retention={"delete_rate": 5}), load(tmp_path, "retention:\n")):
    assert ckpt.policies.Retention.from_config(config.retention).keeps_all


@pytest.mark.parametrize(
  "layout",
  [
    {"compression": "on"},
    {"replica_parallel": "off"},
    {"target_file_size": "1MiB"},
    {"compression": "off"},
    {"pack": "on"},
    {"pack": "on", "compression": "on", "target_file_size": "1MiB"},
    {"chunk_size": "1kB"},
  ],
)
def test_every_layout_saves_and_restores(layout, tmp_path, assert_same):
  import jax
  import jax.numpy as jnp

  state = {"w": jnp.arange(3000.0), "key": jax.random.key(1), "n": 3, "s": "x"}
  limits = {"save_concurrency": "15kB", "restore_concurrency": "50kB"}
  with ckpt.Checkpointer(tmp_path, ckpt.Config(layout=layout, limits=limits)) as c:
    c.save(0, state)
    assert_same(c.restore(like=state).state, state)


def test_s3_without_credentials_says_so_instead_of_waiting(monkeypatch, tmp_path):
  for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
  monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
  with pytest.raises(ckpt.StorageError, match="no credentials"):
    ckpt.Checkpointer("s3://bucket/run")


def test_chunk_above_the_limits_is_written_and_read_alone(tmp_path):
  import jax
  import jax.numpy as jnp

  limits = {"save_concurrency": "1kB", "restore_concurrency": "1kB"}
  with ckpt.Checkpointer(tmp_path, ckpt.Config(limits=limits)) as c:
    c.save(0, {"w": jnp.ones(1000)})
    got = c.restore(like={"w": jax.device_put(jnp.ones(1000), jax.devices()[0])})
    assert got.state["w"].sum() == 1000


@pytest.mark.parametrize(
  "text", ["schedule: {every_steps: 1e400}", "schedule: {every: 1:30}", "restore: {verify: !!bool x}"]
)
def test_values_that_yaml_reads_oddly_are_refused_with_their_line(text, tmp_path):
  file = tmp_path / "odd.yaml"
  file.write_text(text)
  with pytest.raises(ckpt.ConfigError, match=r"odd\.yaml:1: (schedule|restore)\."):
    ckpt.load_config(file)
