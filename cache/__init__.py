"""The store, format version 1: manifest, writer, memory-mapped reader, ledger, verification. Never imports torch."""
