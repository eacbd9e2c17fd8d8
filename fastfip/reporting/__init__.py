"""How results are shown: tables, JSON, plots."""
