"""Model folders as files: read lazily, write whole. Nothing here knows mathematics."""
