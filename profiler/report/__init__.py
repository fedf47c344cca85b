"""`step-oracle report` and `trace perfetto`: a pack, its errors and a run's steps as pictures (README.md)."""
