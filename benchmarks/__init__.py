"""Side-by-side measurements. One run prints one report: `python benchmarks/read_store.py`."""
