"""What ranks run that a test starts with torchrun or a fork."""
