"""The report of differences between `like` and a checkpoint, for ten typical mistakes.

docs/mismatch.md shows these very reports: `python tests/restore/test_mismatch.py > docs/mismatch.md` writes it anew.
"""

import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ckpt_jax as ckpt

DOC = pathlib.Path(__file__).parents[2] / "docs" / "mismatch.md"


def params(layers=3, width=4, vocabulary=8, dtype=jnp.float32, scanned=False, name="layer_{}", inner="kernel"):
  dense = {inner: jnp.ones((width, 2 * width), dtype), "bias": jnp.ones(2 * width, dtype)}
  if scanned:
    blocks = {"layers": jax.tree.map(lambda x: jnp.stack([x] * layers), dense)}
  else:
    blocks = {name.format(i): dense for i in range(layers)}
  return {"embedding": jnp.ones((vocabulary, width), dtype), **blocks}


def state(optimizer=None, **kwargs):
  p, optimizer = params(**kwargs), optimizer or optax.adam(1e-3)
  return {"params": p, "opt_state": optimizer.init(p), "step": jnp.int32(7)}


def with_lora(tree):
  for name in ("layer_0", "layer_1", "layer_2"):
    tree["params"][name] = {**tree["params"][name], "lora_a": jnp.zeros((4, 2))}
  return tree


def transposed(tree):
  tree["params"]["embedding"] = tree["params"]["embedding"].T
  return tree


MISTAKES = {
  "A module was renamed": (lambda: state(), lambda: state(name="block_{}")),
  "A weight is transposed": (lambda: {"params": params()}, lambda: transposed({"params": params()})),
  "Another number of layers": (lambda: {"params": params()}, lambda: {"params": params(layers=5)}),
  "Scanned layers against unrolled ones": (
    lambda: {"params": params()},
    lambda: {"params": params(scanned=True)},
  ),
  "Half precision against single": (lambda: {"params": params()}, lambda: {"params": params(dtype=jnp.bfloat16)}),
  "Another optimizer": (lambda: state(), lambda: state(optax.sgd(0.1, momentum=0.9))),
  "The vocabulary was resized": (lambda: {"params": params()}, lambda: {"params": params(vocabulary=10)}),
  "Only the parameters were passed": (lambda: state(), lambda: params()),
  "LoRA weights that the checkpoint lacks": (
    lambda: {"params": params()},
    lambda: with_lora({"params": params()}),
  ),
  "A raw PRNG key against a typed one": (
    lambda: {"rng": jax.random.key(0), "params": params()},
    lambda: {"rng": jax.random.PRNGKey(0), "params": params()},
  ),
}


def report(saved, like):
  with tempfile.TemporaryDirectory() as run:
    with ckpt.Checkpointer(run) as c:
      c.save(0, saved)
      with pytest.raises(ckpt.StructureMismatchError) as e:
        c.restore(like=like)
    return str(e.value).replace(run, "RUN")


def document():
  parts = [
    "# What a mismatch looks like\n",
    "Everything that differs between `like=` and a checkpoint is found before a byte of it is read, and reported at "
    "once. Nothing is cast, padded, cut or left at its initial value unless `cast=` or `init_missing=` name it. Ten "
    "typical mistakes, and the reports that they give (`python tests/restore/test_mismatch.py > docs/mismatch.md`):\n",
  ]
  for title, (saved, like) in MISTAKES.items():
    parts.append(f"## {title}\n\n```text\n{report(saved(), like())}\n```\n")
  return "\n".join(parts)


def test_document_shows_the_reports_as_they_are():
  assert DOC.read_text() == document()


@pytest.mark.parametrize(
  ("mistake", "hint"),
  [
    ("A module was renamed", "renamed? what like calls 'block_*' is 'layer_*'"),
    ("A weight is transposed", "transposed (params/embedding)"),
    ("Another number of layers", "params/layer_*: like has 5, the checkpoint 3: another layer count?"),
    (
      "Scanned layers against unrolled ones",
      "3 separate layers params/layer_*, like has them stacked at params/layers",
    ),
    ("Half precision against single", "cast=True converts"),
    ("Another optimizer", "only=['params', 'step'], init_missing='opt_state'"),
    ("The vocabulary was resized", "vocabulary resized from 8 to 10"),
    ("Only the parameters were passed", "below params/"),
    ("LoRA weights that the checkpoint lacks", "init_missing='**/lora_a'"),
    ("A raw PRNG key against a typed one", "jax.random.key makes typed keys"),
  ],
)
def test_report_says_what_may_have_happened(mistake, hint):
  saved, like = MISTAKES[mistake]
  assert hint in report(saved(), like())


def restarted(saved, init):
  with tempfile.TemporaryDirectory() as run, ckpt.Checkpointer(run) as c:
    c.save(0, saved)
    with pytest.raises(ckpt.StructureMismatchError) as e:
      c.restore_or_init(init)
  return str(e.value)


def test_wider_layer_is_no_other_number_of_layers_and_what_fits_is_no_difference():
  text = restarted(state(), lambda: state(width=6) | {"step": 0})  # an int where the checkpoint has an int32
  assert "4 in the checkpoint is 6 in like (" in text and "another width of the model?" in text
  assert "stacked" not in text and "cast=" not in text.split("Here like=")[0] and "step" not in text


def test_longer_stack_of_layers_is_one_in_every_leaf_of_it():
  stack = lambda n: {"layers": params(scanned=True, layers=n)["layers"], "head": jnp.ones((4, 3))}  # noqa: E731
  text = report(stack(3), stack(5))
  assert "another number of stacked layers? the first axis is 3 in the checkpoint, 5 in like" in text
  assert "another width" not in text
  text = report(stack(3), stack(3) | {"head": jnp.ones((6, 3))})
  assert "stacked layers?" not in text and "another width of the model?" in text


def test_advice_of_restore_or_init_can_be_followed():
  text = restarted(state(), lambda: state(layers=5))
  assert "does not fit the state that init_fn makes" in text and "Pass a like=" not in text
  assert "call restore(like=init_fn(), ...) with only=, init_missing= or cast=" in text


def test_report_stays_short_for_many_leaves():
  text = report({f"w{i}": {"a": np.ones(2)} for i in range(300)}, {f"w{i}": {"b": np.ones(2)} for i in range(300)})
  assert "w*/b: not in the checkpoint (300 leaves, such as w0/b)" in text
  assert "600 differences" in text and len(text.splitlines()) < 15


def test_thousands_of_differences_are_reported_within_seconds():
  from ckpt_jax.restore.hints import ShapeDtype, explain

  def seconds(layers):
    like = {f"a/{i}/{j}/kernel": ShapeDtype((i + 1, j), "float32") for i in range(layers) for j in range(50)}
    saved = {f"b/{i}/{j}/weight": ShapeDtype((i + 1, j), "float32") for i in range(layers) for j in range(50)}
    started = time.process_time()
    explain(like, saved)
    return time.process_time() - started

  few, many = (min(seconds(layers) for _ in range(3)) for layers in (20, 100))
  assert many < 15 * few, "five times the leaves, and 25 times the pairs of them"


if __name__ == "__main__":
  sys.stdout.write(document())
