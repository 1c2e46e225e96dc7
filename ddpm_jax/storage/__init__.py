"""What runs write and read: workdirs, checkpoints, logs."""
