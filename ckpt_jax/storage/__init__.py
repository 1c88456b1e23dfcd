"""Know your storage: what a path lies on (kinds), how fast it is (probe), and how TensorStore and Orbax reach it."""
