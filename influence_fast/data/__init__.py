"""Datasets: rows, their schemas, examples as text, token ids and packs; duplicates, overlaps and fingerprints."""
