"""What lies between any two checkpoints, in numbers and in words."""
