"""The verbs of the command line. click and nothing heavy at import: each imports what it needs when it runs."""
