"""One save, from the state that training holds to a commit: admission, snapshot, write, commit."""
