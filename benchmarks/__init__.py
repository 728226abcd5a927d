"""Scripts that measure: each writes ``build/<name>.json`` and ends with a table of the same."""
