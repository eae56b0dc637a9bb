"""From a table to the rows that are wrong, and why: signals, one suspicion score, findings."""
