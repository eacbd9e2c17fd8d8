"""A purification from the given model to the result: copy, loop, scores."""
