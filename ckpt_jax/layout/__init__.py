"""Arrays in a step: structure, sharding, encoding, packing, reading and writing them through Orbax."""
