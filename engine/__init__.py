"""The engine: samples → watermark → model → capture → staging → store."""
