"""What tools.record knows about submission folders: how one is read, its rules, its statistics."""
