"""Know your storage: its kind (kinds), its speed (probe), and how TensorStore and Orbax reach it (connect)."""
