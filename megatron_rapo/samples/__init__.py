"""What a run sampled: written to Parquet step by step, read and shown again (`docs/samples.md`)."""
