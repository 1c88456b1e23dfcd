"""Where records go beside the run: read back from each sink as its own readers would."""

import struct
import sys
import urllib.request

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt
from ckpt_jax.observe import Save, scalars, sinks

STATE = {"params": {"w": jnp.ones((8, 8))}}


def train(run, observe=None, on_event=None):
  with ckpt.Checkpointer(run, {"observe": observe or {}}, on_event=on_event) as c:
    for step in range(2):
      c.save(step, STATE)
    c.wait()
    c.restore(like=STATE)
  return c


def test_a_function_gets_each_record_as_its_type(tmp_path):
  seen = []
  train(tmp_path, on_event=seen.append)
  assert [e.kind for e in seen] == ["start", "plan", "save", "save", "restore", "end"]
  assert len({e.attempt for e in seen}) == 1 and seen[0].attempt
  numbers = scalars(seen[2])
  assert numbers["save/nbytes"] == 256 and numbers["save/norm/params"] == 8.0 and scalars(seen[0]) == {}


def test_tensorboard_has_the_scalars_of_each_step(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  train(tmp_path / "run", {"tensorboard": str(tmp_path / "tb")})
  (file,) = (tmp_path / "tb").iterdir()
  data, found = file.read_bytes(), {}
  while data:  # TFRecord: length, its checksum, the message, its checksum
    (length,) = struct.unpack("<Q", data[:8])
    event = Event.FromString(data[12 : 12 + length])
    found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    data = data[16 + length :]
  assert found["ckpt/save/nbytes", 0] == found["ckpt/save/nbytes", 1] == 256
  assert found["ckpt/save/blocking_s", 1] > 0 and found["ckpt/restore/seconds", 1] > 0


def test_prometheus_serves_counters_of_several_runs(tmp_path):
  import prometheus_client

  registry = prometheus_client.CollectorRegistry()
  for name in ("a", "b"):
    train(tmp_path / name, on_event=sinks.prometheus(0, name, registry))
  for name in ("a", "b"):
    assert registry.get_sample_value("ckpt_jax_events_total", {"run": name, "kind": "save"}) == 2
    assert registry.get_sample_value("ckpt_jax_bytes_total", {"run": name, "what": "restore"}) == 256
    assert registry.get_sample_value("ckpt_jax_seconds_count", {"run": name, "part": "blocking"}) == 2
  server, thread = prometheus_client.start_http_server(0, registry=registry)
  page = urllib.request.urlopen(f"http://localhost:{server.server_port}", timeout=30).read().decode()
  server.shutdown()
  server.server_close()
  thread.join(30)
  assert 'ckpt_jax_committed_step{run="b"} 1.0' in page


def test_opentelemetry_has_a_span_for_each_save_with_its_parts(tmp_path, monkeypatch):
  from opentelemetry import trace
  from opentelemetry.sdk.trace import TracerProvider
  from opentelemetry.sdk.trace.export import SimpleSpanProcessor
  from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

  exporter, provider = InMemorySpanExporter(), TracerProvider()
  provider.add_span_processor(SimpleSpanProcessor(exporter))
  monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
  c = train(tmp_path, {"opentelemetry": True})
  spans = exporter.get_finished_spans()
  saves = [s for s in spans if s.name == "ckpt_jax.save"]
  assert [s.attributes["step"] for s in saves] == [0, 1]
  parts = [s for s in spans if s.parent is not None and s.parent.span_id == saves[0].context.span_id]
  assert [p.name for p in parts] == ["blocking", "write", "commit"]
  assert (parts[0].end_time - parts[0].start_time) / 1e9 == pytest.approx(c.saves[0].blocking_s, abs=1e-3)
  assert saves[0].start_time == parts[0].start_time and saves[0].end_time == parts[2].end_time
  assert [s.attributes["strategy"] for s in spans if s.name == "ckpt_jax.restore"] == ["direct"]


@pytest.mark.parametrize(
  ("observe", "module", "extra"),
  [
    ({"tensorboard": "tb"}, "tensorboardX", "tensorboard"),
    ({"prometheus": 0}, "prometheus_client", "prometheus"),
    ({"opentelemetry": True}, "opentelemetry.trace", "opentelemetry"),
  ],
)
def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch, observe, module, extra):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ckpt.ConfigError, match=rf"pip install 'ckpt-jax\[{extra}\]'"):
    ckpt.Checkpointer(tmp_path, {"observe": observe})


def test_a_failing_save_of_a_sink_is_not_the_saves(tmp_path):
  assert scalars(Save(step=1, time=1.0))["save/retries"] == 0
