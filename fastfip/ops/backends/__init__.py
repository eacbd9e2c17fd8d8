"""Whether a backend can run here, and why not. Importing them never fails and loads no compiler."""
