"""Whatever tree `save` accepts comes back with its structure, types and bits; what cannot is refused by its name."""

import collections
import dataclasses
import enum
import functools
import subprocess
import sys

import equinox as eqx
import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import bits
from flax import nnx
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from jax.tree_util import GetAttrKey, Partial, SequenceKey

import ckpt_jax as ckpt
from ckpt_jax.layout import contents, encoding
from ckpt_jax.layout.structure import path_name

# -- nodes of every kind


class Pair(collections.namedtuple("Pair", ["one", "two"])):
  pass


@flax.struct.dataclass
class FlaxNode:
  one: object
  two: object
  name: str = flax.struct.field(pytree_node=False, default="fixed")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["one", "two"], meta_fields=["name"])
@dataclasses.dataclass
class JaxNode:
  one: object
  two: object
  name: str = "fixed"


class EqxNode(eqx.Module):
  one: object
  two: object
  name: str = eqx.field(static=True, default="fixed")


class Custom:
  """A node registered in one of several ways; it looks at what it is given."""

  def __init__(self, *children):
    if any(type(child).__module__.startswith("orbax") for child in children):
      raise TypeError("not what this node holds")
    self.children = children


class Numbered(Custom):
  pass


class Texts(Custom):
  pass


class Mixed(Custom):
  pass


class Backwards(Custom):
  pass


def _register(kind, keys):
  def flatten(node):
    return tuple(zip(keys(len(node.children)), node.children, strict=True)), None

  jax.tree_util.register_pytree_with_keys(kind, flatten, lambda _, children: kind(*children))


jax.tree_util.register_pytree_node(Numbered, lambda n: (n.children, None), lambda _, children: Numbered(*children))
_register(Texts, lambda n: [f"child {i}" for i in range(n)])
_register(Mixed, lambda n: [SequenceKey(i) if i % 2 else GetAttrKey(f"n{i}") for i in range(n)])
_register(Backwards, lambda n: [SequenceKey(n - i) for i in range(n)])


class Color(enum.Enum):
  RED = 1
  BLUE = 2


# -- leaves and trees of all that

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint32", "bool", "complex64", "int4", "uint4", "int2", "uint2"]
DTYPES += ["float8_e4m3", "float8_e4m3fn", "float8_e5m2", "float8_e3m4", "float8_e8m0fnu", "float4_e2m1fn"]
NUMPY_ONLY = ["float64", "int64", "complex128", "float6_e2m3fn", "float6_e3m2fn", "int1", "uint1"]


def values_of(dtype, shape, seed):
  """Bits of every kind, NaNs and denormals among them."""
  dtype = np.dtype(dtype)
  n = int(np.prod(shape))
  if dtype.kind == "b":
    return (np.arange(n) % 2 == 0).reshape(shape)
  raw = np.random.default_rng(seed).integers(0, 256, n * dtype.itemsize, np.uint8)
  if dtype.type.__module__ == "ml_dtypes" and dtype.itemsize == 1:
    info = ml_dtypes.iinfo if "int" in dtype.name else ml_dtypes.finfo
    width = info(dtype).bits
    if "int" in dtype.name and not dtype.name.startswith("u"):
      raw = (raw & ((1 << width) - 1)).astype(np.int8) - (1 << (width - 1))
      return raw.astype(dtype).reshape(shape)
    raw &= (1 << width) - 1
  return raw.view(dtype).reshape(shape)


PLAIN = [0, -3, 2**40, True, 1.5, -0.0, float("inf"), 2 - 1j, "", "text", "ключ\0"]
KEYS = [jax.random.key(1), jax.random.split(jax.random.key(2, impl="rbg"), 2)]


def _made():
  model = nnx.Sequential(nnx.Linear(1, 2, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(2, 1, rngs=nnx.Rngs(1)))
  return [
    optax.adam(1e-3).init({"w": jnp.ones(2)}),
    optax.inject_hyperparams(optax.sgd)(0.1).init(jnp.ones(1)),
    optax.masked(optax.sgd(0.1, momentum=0.9), {"w": True, "b": False}).init({"w": jnp.ones(2), "b": jnp.ones(1)}),
    model,
    nnx.state(model),
    nnx.split(model),
    nnx.Rngs(0, dropout=1),
    eqx.filter(eqx.nn.MLP(1, 1, 2, 1, key=jax.random.key(0)), eqx.is_array),
  ]


MADE = _made()
LEAVES = {
  "array": lambda dtype, shape, seed: jnp.asarray(values_of(dtype, shape, seed)),
  "numpy": values_of,
  "scalar": lambda dtype, seed: values_of(dtype, (), seed)[()],
  "plain": PLAIN.__getitem__,
  "key": KEYS.__getitem__,
  "made": MADE.__getitem__,
  "none": lambda: None,
}
NODES = {
  "dict": lambda keys, children: dict(zip(keys, children, strict=False)),
  "frozen": lambda keys, children: flax.core.freeze(dict(zip(keys, children, strict=False))),
  "default": lambda keys, children: collections.defaultdict(int, zip(keys, children, strict=False)),
  "ordered": lambda keys, children: collections.OrderedDict(zip(keys, children, strict=False)),
  "list": lambda _, children: children,
  "tuple": lambda _, children: tuple(children),
  "pair": lambda _, children: Pair(*_two(children)),
  "flax": lambda _, children: FlaxNode(*_two(children)),
  "jax": lambda _, children: JaxNode(*_two(children)),
  "eqx": lambda _, children: EqxNode(*_two(children)),
  "partial": lambda _, children: Partial(max, *children[:1], **dict(zip("ab", children[1:], strict=False))),
  "numbered": lambda _, children: Numbered(*children),
  "texts": lambda _, children: Texts(*children),
  "mixed": lambda _, children: Mixed(*children),
  "backwards": lambda _, children: Backwards(*children),
  "nnx list": lambda _, children: nnx.List([_nnx(child) for child in children]),
  "nnx dict": lambda _, children: nnx.Dict({name: _nnx(child) for name, child in zip("abc", children, strict=False)}),
}


def _two(children):
  return [*children, None, None][:2]


def _nnx(child):
  return nnx.Param(child) if isinstance(child, jax.Array) else nnx.data(child)


def build(recipe):
  kind, *rest = recipe
  if kind in LEAVES:
    return LEAVES[kind](*rest)
  keys, children = rest
  return NODES[kind]([object() if key == "an object" else key for key in keys], [build(child) for child in children])


shapes = st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0)])
seeds = st.integers(0, 10)
leaves = st.one_of(
  st.tuples(st.just("array"), st.sampled_from(DTYPES), shapes, seeds),
  st.tuples(st.just("numpy"), st.sampled_from(DTYPES + NUMPY_ONLY), shapes, seeds),
  st.tuples(st.just("scalar"), st.sampled_from(DTYPES + NUMPY_ONLY), seeds),
  st.tuples(st.just("plain"), st.integers(0, len(PLAIN) - 1)),
  st.tuples(st.just("key"), st.integers(0, len(KEYS) - 1)),
  st.tuples(st.just("made"), st.integers(0, len(MADE) - 1)),
  st.just(("none",)),
)
texts = st.one_of(
  st.sampled_from(["a", "b", "a/b", "a.b", "", "0", "1", ".", "/", "..", "0.0", ".zarray", "c/0", "$", "%2F", "\n"]),
  st.text(max_size=4),
)
numbers = st.integers(-1, 3)
odd = st.sampled_from([b"a", (1, "a"), Color.RED, 0.5, None, True, frozenset("ab"), "an object"])
some_keys = st.one_of(
  st.lists(texts, max_size=3, unique=True),
  st.lists(numbers, max_size=3, unique=True),
  st.lists(odd, max_size=1),
  st.lists(st.one_of(texts, numbers, odd), max_size=3, unique_by=lambda key: (type(key), key)),
)
recipes = st.recursive(
  leaves,
  lambda inner: st.tuples(st.sampled_from(sorted(NODES)), some_keys, st.lists(inner, max_size=3)),
  max_leaves=8,
)


def named(tree):
  return [(path_name(path), path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def exact(leaf):
  return repr(leaf) if isinstance(leaf, (float, complex)) and not isinstance(leaf, np.generic) else bits(leaf)


def stored(leaf):
  """What a leaf is without `like`: the same values, in a jax or a numpy array."""
  found = exact(leaf)
  return found[1:] if isinstance(leaf, (jax.Array, np.ndarray, np.generic)) else found


def may_be_refused(tree):
  """Whether a checkpoint cannot hold the tree, found out in another way than `save` does."""
  try:
    rows = named(tree)
  except (ValueError, TypeError):
    return True  # keys that cannot be ordered
  if not rows and not jax.tree_util.tree_leaves(tree, is_leaf=lambda x: x is not tree):
    return True  # nothing at all
  called = [name for name, _, _ in rows]
  dotted = [
    ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path) for _, path, _ in rows
  ]
  if len(set(called)) < len(rows) or len(set(dotted)) < len(rows):
    return True
  return _has_bad_key(tree)


def _has_bad_key(node):
  children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
  if children and not children[0][0]:
    return False
  alike = [path_name(path) for path, _ in children]
  for (key,), name in zip([path for path, _ in children], alike, strict=True):
    if isinstance(getattr(key, "key", None), frozenset) or type(getattr(key, "key", None)) is object:
      return True
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or any(0xD800 <= ord(c) < 0xE000 for c in name):
      return True
  return len(set(alike)) < len(alike) or any(_has_bad_key(child) for _, child in children)


@pytest.fixture(scope="module", params=["off", "on"])
def opened(request, tmp_path_factory):
  settings_ = {
    "layout": {"pack": request.param},
    "health": {"nonfinite": "ignore"},
    "restore": {"on_corruption": "raise"},
  }
  with ckpt.Checkpointer(tmp_path_factory.mktemp("run"), settings_) as c:
    yield c


@settings(max_examples=60)
@given(recipe=recipes)
def test_what_save_accepts_comes_back_and_what_it_refuses_is_named(opened, recipe):
  try:
    tree = build(recipe)
  except TypeError:  # flax's own containers refuse what jax cannot order
    reject()
  step = (opened.latest_step() or 0) + 1
  try:
    opened.save(step, tree)
  except ckpt.CheckpointError as e:
    assert may_be_refused(tree), e
    assert "cannot save this state; nothing was written" in str(e) and not isinstance(e, ckpt.SaveFailedError)
    return
  opened.wait()
  assert not may_be_refused(tree)
  same = opened.restore(step, like=tree).state
  assert jax.tree.structure(same) == jax.tree.structure(tree)
  for (name, _, got), (_, _, want) in zip(named(same), named(tree), strict=True):
    assert exact(got) == exact(want), name
  free = {name: stored(leaf) for name, _, leaf in named(opened.restore(step).state)}
  shared = {name: leaf for name, _, leaf in named(tree) if name not in free}  # nnx Variables with two places
  assert free == {name: stored(leaf) for name, _, leaf in named(tree) if name not in shared}
  assert {id(leaf) for leaf in shared.values()} <= {id(leaf) for name, _, leaf in named(tree) if name in free}
  assert not shared or "made" in repr(recipe)
  assert ckpt.verify(opened.directory, step) == []


def model(seed=0):
  rngs = nnx.Rngs(seed)
  return nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 2, rngs=rngs))


def test_an_nnx_module_with_a_list_comes_back_as_a_module_that_computes_the_same(tmp_path, assert_same):
  first, x = model(), jnp.ones((1, 2))
  with ckpt.Checkpointer(tmp_path) as c:
    c.save(0, first)
    c.wait()
    assert np.array_equal(c.restore(like=model(1)).state(x), first(x))
    assert np.array_equal(c.restore(like=nnx.eval_shape(model)).state(x), first(x))
    assert np.array_equal(c.restore_or_init(lambda: model(1)).state(x), first(x))
    assert_same(c.restore(like=nnx.state(model(1))).state, nnx.state(first))
    part = c.restore(only="layers/2").state["layers"]["2"]
    assert np.array_equal(part["kernel"]["value"], first.layers[2].kernel[...])
    assert next(leaf.path for leaf in contents.describe(tmp_path).leaves) == "layers/0/bias/value"
  with ocp.CheckpointManager(tmp_path) as manager:  # raw Orbax saves such a module and cannot read it
    plain = manager.restore(0, args=ocp.args.StandardRestore())
  assert np.array_equal(plain["layers"]["2"]["kernel"]["value"], first.layers[2].kernel[...])


def test_a_module_that_was_saved_with_keys_of_both_kinds_can_be_restored(tmp_path, monkeypatch):
  monkeypatch.setattr(encoding, "form_of", lambda structure, tree: None)  # as it was
  first, x = model(), jnp.ones((1, 2))
  for pack in ("off", "on"):
    with ckpt.Checkpointer(tmp_path / pack, {"layout": {"pack": pack}}) as c:
      c.save(0, first)
      c.wait()
      assert np.array_equal(c.restore(like=model(1)).state(x), first(x))
      assert set(c.restore(only="layers").state["layers"]) == {"0", "2", "_pytree__state"}


def test_a_module_that_plain_orbax_saved_and_cannot_read_is_restored(tmp_path):
  first, x = model(), jnp.ones((1, 2))
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(0, args=ocp.args.StandardSave({"model": first, "step": 3}))
    manager.wait_until_finished()
    with pytest.raises(TypeError):  # once it can, this package need not read such steps by itself
      manager.restore(0, args=ocp.args.StandardRestore())
  with ckpt.Checkpointer(tmp_path) as c:
    restored = c.restore(like={"model": model(1), "step": 0}).state
    assert np.array_equal(restored["model"](x), first(x)) and restored["step"] == 3
    assert list(c.restore(only="model/layers/0").state["model"]["layers"]) == ["0"]
  assert ckpt.verify(tmp_path) == []


LONE = {
  "jax array": jnp.arange(4.0),
  "numpy array": np.arange(3),
  "empty array": jnp.zeros((0, 2), jnp.bfloat16),
  "number": 7,
  "text": "text",
  "numpy number": np.float16(1.5),
  "key": jax.random.key(3),
  "float8": jnp.ones(3, jnp.float8_e4m3),
}


@pytest.mark.parametrize("pack", ["off", "on"])
def test_a_state_that_is_one_leaf_comes_back(tmp_path, pack):
  for name, state in LONE.items():
    with ckpt.Checkpointer(tmp_path / name, {"layout": {"pack": pack}}) as c:
      assert c.save(0, state)
      c.wait()
      for restored in (c.restore(like=state), c.restore()):
        assert stored(restored.state) == stored(state) and restored.report.verified == 1
      assert bits(c.restore_or_init(lambda state=state: state).state) == bits(state)
    assert ckpt.verify(tmp_path / name) == []
  with ocp.CheckpointManager(tmp_path / "jax array") as manager:
    assert np.array_equal(manager.restore(0, args=ocp.args.StandardRestore()), LONE["jax array"])
  shown = subprocess.run(
    [sys.executable, "-m", "ckpt_jax", "show", tmp_path / "jax array"], capture_output=True, text=True, timeout=120
  )
  assert shown.returncode == 0 and "(the state itself)" in shown.stdout
  with ckpt.Checkpointer(tmp_path / "jax array") as c:
    with pytest.raises(ckpt.StructureMismatchError, match=r"\(the state itself\): saved as float32\[4\], asked for"):
      c.restore(like=jnp.zeros(5))
    with pytest.raises(ckpt.StructureMismatchError, match="which is one leaf"):
      c.restore(only="params")


def test_a_like_or_an_orbax_step_with_two_leaves_of_one_name_is_refused(tmp_path):
  two = {"a": {"b": jnp.ones(2)}, "a/b": jnp.zeros(2)}
  with ckpt.Checkpointer(tmp_path / "ours") as c:
    c.save(0, {"a": {"b": jnp.ones(2)}})
    c.wait()
    with pytest.raises(
      ckpt.StructureMismatchError, match=r"like=.*\n  a/b: is the name of \['a'\]\['b'\] and \['a/b'\]"
    ):
      c.restore(like=two)
  with ocp.CheckpointManager(tmp_path / "orbax") as manager:
    manager.save(0, args=ocp.args.StandardSave(two))
  with ckpt.Checkpointer(tmp_path / "orbax") as c:
    with pytest.raises(ckpt.StructureMismatchError, match=r"orbax/0: .*\n  a/b: is the name of"):
      c.restore()
    assert c.latest_step() == 0  # nothing is damaged
