"""Files that code of 2026-11-30 wrote, and that still open."""
