"""Files that runs write and read: workdirs, checkpoints, logs."""
