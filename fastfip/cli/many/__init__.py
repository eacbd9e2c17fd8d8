"""Many purifications: a manifest of rows, a process for each, one file of results."""
