"""From scores to what a person can act on: plots, findings, one page of HTML, the command line."""
