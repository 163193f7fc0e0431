"""What this machine lends: files that appear whole or not at all, devices, cores and signals."""
