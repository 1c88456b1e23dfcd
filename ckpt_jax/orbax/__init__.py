"""The one door to what is inside Orbax: private names, its names of files, the manager that we extend."""
