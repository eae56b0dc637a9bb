"""Values of training rows from index sets and numbers alone."""
