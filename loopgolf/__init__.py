"""What others rely on, and a run stands on: a file for each."""
