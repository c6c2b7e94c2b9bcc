"""What every claimed figure comes from; README.md says how to run each."""
