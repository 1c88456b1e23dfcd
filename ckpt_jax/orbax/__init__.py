"""The one door to Orbax's insides: private names, names of files and keys, and the manager that we extend."""
