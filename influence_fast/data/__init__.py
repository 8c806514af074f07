"""From any dataset to token ids: rows, their schemas, examples as text, packs; and what texts have in common."""
