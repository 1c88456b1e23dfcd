"""One restore: which step, matching it with `like`, who reads what, and falling back from damage."""
