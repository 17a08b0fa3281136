"""Rules that the repository keeps: floors, packages, pages."""
