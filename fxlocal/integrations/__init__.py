"""What other packages' training loops need to train by a schedule: one file for each package."""
